"""The defaults that a trial's identity is told against, and the settings that cannot change a result.

A setting belongs to a trial's identity only where it differs from its default here. A default that changes later in a
spec class stays as it is in this table: then the new value is another trial, and the old one keeps its id. A new
setting is added here with the value that means what was done before it existed, which is its default.
"""

from __future__ import annotations

from typing import Any

IDENTITY_VERSION = 1
"""Raised when the identity of all trials changes; rows are recognised by settings and content, not by their id."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "Quantization": {"quant_type": "nf4", "double_quant": True, "compute_dtype": "bfloat16"},
    "Stage": {"lr": 0.0001, "weight_decay": 0.0, "max_grad_norm": 1.0, "betas": [0.9, 0.999]},
    "FullWeights": {"weights": "bfloat16_stochastic"},
    "FullFineTuning": {"lr": 2e-05, "optim": "adamw"},
    "MatrixWeights": {"targets": ["attn", "mlp"], "layerwise": False, "eps": 1e-06},
    "ProjectedGradients": {"moments": "weights", "gradients": "device", "update_proj_gap": 200},
    "SingularSubspaces": {"rank": 128, "scale": 0.25, "proj_type": "std", "svd": "randomized"},
    "GaLore": {"svd": "exact"},
    "APOLLO": {"rank": 128, "scale": 1.0},
    "APOLLOMini": {"rank": 1, "scale": 128**0.5},
    "Muon": {"momentum": 0.95, "nesterov": True, "rounds": 5, "lr": 2e-05},
    "LayersInTurn": {"optim": "adamw"},
    "LISA": {"layers": 2, "every": 20, "lr": 5e-05},
    "BAdam": {"order": "random", "every": 100, "lr": 5e-05},
    "Adapter": {"adapter_dtype": "float32", "lr": 0.0002, "optim": "adamw"},
    "LayerAdapter": {
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "modules_to_save": [],
    },
    "LowRankAdapter": {
        "rank": 16,
        "alpha": 32.0,
        "dropout": 0.0,
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "adapter_dtype": "float32",
        "lr": 0.0002,
        "optim": "adamw",
        "rank_pattern": {},
        "alpha_pattern": {},
    },
    "QLoRA": {"quant_type": "nf4", "double_quant": True, "compute_dtype": "bfloat16"},
    "RsLoRA": {"alpha": 8.0},
    "PiSSA": {"iterations": None},
    "LoftQ": {"iterations": 16},
    "LoRAPlus": {"ratio": 16.0, "lr": 5e-05},
    "AdaLoRA": {
        "rank": 12,
        "target_rank": 8,
        "alpha": 32.0,
        "dropout": 0.0,
        "begin": 0.1,
        "end": 0.3,
        "every": 1,
        "orthogonality": 0.1,
        "total_steps": None,
    },
    "VeRA": {"rank": 256, "d_initial": 0.1, "dropout": 0.0, "lr": 0.004},
    "IA3": {"targets": ["k_proj", "v_proj", "down_proj"], "feedforward": ["down_proj"], "lr": 0.003},
    "OFT": {"block_size": 32, "cayley_terms": 5, "dropout": 0.0},
    "BOFT": {"block_size": 4, "factors": 1, "dropout": 0.0},
    "HRA": {"rank": 8, "orthogonal": False},
    "MiSS": {"rank": 32, "dropout": 0.0},
    "SHiRA": {"rank": 16, "mask_seed": 0, "lr": 0.0003},
    "HiRA": {"rank": 16, "dropout": 0.0, "rank_pattern": {}},
    "GraLoRA": {"rank": 16, "alpha": 32.0, "blocks": 2, "dropout": 0.0},
    "RandLoRA": {"rank": 32, "alpha": 640.0, "dropout": 0.0, "lr": 0.0001},
    "FourierFT": {"frequencies": 1000, "scaling": 300.0, "places_seed": 777, "lr": 0.003},
    "LNTuning": {"targets": ["all-norms"], "lr": 0.001},
    "PromptTuning": {"virtual_tokens": 20, "lr": 0.01},
    "PrefixTuning": {"virtual_tokens": 20, "lr": 0.01},
    "AnyAdapter": {"config": {}},
    "QLoRAThenGaLore": {"switch_at": 2 / 3},
    "Member": {"model": None, "seed": None},
    "ModelSpec": {
        "revision": None,
        "tokenizer": None,
        "dtype": "bfloat16",
        "quantization": None,
        "attention": None,
        "random_weights": False,
        "trust_remote_code": False,
        "new_tokens": [],
    },
    "TrainSpec": {
        "epochs": None,
        "steps": None,
        "batch_size": 16,
        "micro_batch_size": 1,
        "schedule": "cosine",
        "warmup_steps": 0,
        "warmup_ratio": 0.0,
        "gradient_checkpointing": False,
        "fit": None,
        "precision": "bf16",
        "log_every": 10,
        "eval_every": None,
        "checkpoint_every": None,
        "save_dtype": "bfloat16",
        "warm_start": None,
    },
    "LlmTrainSpec": {"loss": "answers", "engine": "own", "cuda_graphs": True, "pack": False, "objective": "sft"},
    "PreferenceSpec": {
        "beta": 0.1,
        "loss": "sigmoid",
        "label_smoothing": 0.0,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
    },
    "ImageTrainSpec": {
        "prediction": None,
        "snr_gamma": None,
        "noise_offset": 0.0,
        "ema_decay": None,
        "cuda_graphs": True,
    },
    "ResourcesSpec": {
        "num_workers": 1,
        "strategy": "data",
        "gpus_per_worker": None,
        "cpus_per_worker": None,
        "max_failures": 2,
    },
    "TrialSpec": {"seed": 42},
    "SourceSpec": {"test_path": None, "validation": 0, "name": None, "split": "train", "revision": None},
    "ContaminationSpec": {"action": "fail", "ngram": 8, "threshold": 0.7, "boilerplate": 10},
    "DataSpec": {
        "seed": 42,
        "max_length": 512,
        "too_long": "cut",
        "chat_template": None,
        "unusable": "fail",
        "special_tokens": "text",
        "template_date": "2024-07-26",
    },
    "BenchmarksSpec": {
        "num_fewshot": None,
        "limit": None,
        "include_path": None,
        "batch_size": 8,
        "allow_code_execution": False,
    },
    "EvaluationSpec": {
        "split": "test",
        "generate": True,
        "rows": None,
        "max_new_tokens": 256,
        "batch_size": 32,
        "general_text": False,
        "samples": 10,
        "benchmarks": None,
        "metrics": [],
    },
    "ImageDataSpec": {
        "train": 1.0,
        "caption": None,
        "split": "train",
        "revision": None,
        "seed": 42,
        "resolution": 512,
        "crop": "center",
        "flip": False,
        "views": 1,
        "min_side": None,
        "unusable": "fail",
    },
    "ImageEvaluationSpec": {
        "timesteps": 8,
        "prompts": [],
        "seeds": [0, 1],
        "inference_steps": 25,
        "guidance_scale": 7.5,
        "batch_size": 4,
        "style": "vae_gram",
    },
}
"""By class and setting, as JSON-like data; a part that is a spec itself has the defaults of its own class."""

CHANGES_NO_RESULT: dict[str, frozenset[str]] = {
    "TrialSpec": frozenset({"resources"}),
    "TrainSpec": frozenset({"fit", "checkpoint_every"}),
    "LlmTrainSpec": frozenset({"pack"}),
    "EvaluationSpec": frozenset({"samples"}),
    "BenchmarksSpec": frozenset({"allow_code_execution"}),
    "ImageDataSpec": frozenset({"unusable"}),
    "DataSpec": frozenset({"unusable"}),
}
"""What decides where a trial runs, what it may do, and how much of it is shown. Rows of a pass and recomputed
activations stay part of the identity: they change rounding in bfloat16, and the memory that is compared. `fit` comes
back for trials with dropout in TRL's loop, whose draws depend on the rows that it chooses."""

NAMES: dict[str, frozenset[str]] = {
    "ModelSpec": frozenset({"name", "revision", "tokenizer"}),
    "SourceSpec": frozenset({"path", "test_path"}),
    "DataSpec": frozenset({"chat_template"}),
    "BenchmarksSpec": frozenset({"include_path"}),
    "ImageDataSpec": frozenset({"path"}),
    "Member": frozenset({"model"}),
}
"""Settings that only say where something is; its content counts instead."""
