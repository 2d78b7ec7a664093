"""DPO on a GPU: our recorded and plain passes beside TRL's DPOTrainer, and objectives on the same pairs of real rows.

    RAY_PEFT_CONFIGS=configs RAY_PEFT_PAIRS=pairs.jsonl RAY_PEFT_MODEL=smollm2-135m-instruct \
        python benchmarks/preference.py --out results --steps 24

RAY_PEFT_CONFIGS names a folder of folders that hold config.json alone: the weights of the speed cases are random, of
the true shape. Their pairs have log-normal lengths (mean about 190 tokens a side), cut at 512 tokens a side; half of
each side is the prompt. `stock` computes the reference in every step, `stock, precomputed` before the first, as we do.
RAY_PEFT_PAIRS names rows with prompt, chosen and rejected, and RAY_PEFT_MODEL a model with weights: on these every
objective trains with LoRA, and is scored on held-out pairs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import provenance
from speed import Pad, released

from ray_peft.foundation.units import GIB
from ray_peft.spec import TrialSpec
from ray_peft.trial.provenance import device_name

MODEL = "gemma-3-1b-it"
METHODS: dict[str, dict[str, Any]] = {"lora": {"name": "lora", "rank": 16}, "qlora": {"name": "qlora", "rank": 16}}
WAYS = ("recorded", "plain", "stock", "stock, precomputed", "recorded, fp32", "plain, fp32")
"""fp32 is for the equality of recorded and plain passes, not for speed."""
BATCH, LIMIT = 8, 512
OBJECTIVES = ("sft", "dpo", "orpo")


def spec_of(model: Path, method: dict[str, Any], micro: int, steps: int, **train: Any) -> TrialSpec:
    """A trial of DPO on a model's shape."""
    settings = {
        "steps": steps, "batch_size": BATCH, "micro_batch_size": micro, "log_every": max(1, steps // 8),
        "schedule": "constant", "objective": "dpo", "checkpoint_every": None, **train,
    }  # fmt: skip
    return TrialSpec.from_plain(
        {
            "task": "llm_sft",
            "model": {
                "name": str(model),
                "random_weights": True,
                "dtype": "float32" if train["precision"] == "fp32" else "bfloat16",
            },
            "data": {"sources": [{"recipe": "preference", "path": "pairs.jsonl", "train": 1, "test": 1}]},
            "method": method,
            "train": settings,
            "evaluation": {"generate": False},
        }
    )


def pairs_of(steps: int) -> Any:
    """Pairs for all steps, tokenised."""
    import torch
    from datasets import Dataset

    draw = torch.Generator().manual_seed(0)

    def tokens(mean: float, most: int) -> list[int]:
        length = int(torch.empty(1).log_normal_(mean, 0.7, generator=draw).clamp(8, most))
        return torch.randint(10, 900, (length,), generator=draw).tolist()

    rows = []
    for _ in range(steps * BATCH):
        prompt, chosen, rejected = tokens(4.2, LIMIT // 2), tokens(4.2, LIMIT // 2), tokens(4.2, LIMIT // 2)
        masked = [-100] * len(prompt)
        rows.append(
            {
                "input_ids": prompt + chosen, "labels": masked + chosen,
                "rejected_ids": prompt + rejected, "rejected_labels": masked + rejected,
            }
        )  # fmt: skip
    return Dataset.from_list(rows)


def run(model_folder: Path, method: dict[str, Any], micro: int, steps: int, way: str, device: str) -> dict[str, Any]:
    """Train one way; speed without the first third, memory of all."""
    import torch
    from transformers import set_seed

    from ray_peft.engine import gpu_peaks
    from ray_peft.engine.member import Job
    from ray_peft.tasks.llm_sft import train
    from ray_peft.tasks.llm_sft.model import load_model
    from ray_peft.tasks.llm_sft.preference.reference import side_log_probs
    from ray_peft.tasks.llm_sft.preference.steps import REFERENCE, PreferenceRows

    set_seed(0)
    if device != "cpu":
        released()
    precision = "fp32" if "fp32" in way else "bf16"
    spec = spec_of(model_folder, method, micro, steps, cuda_graphs="recorded" in way, precision=precision)
    pairs = pairs_of(steps)
    model = load_model(spec, device)
    ((stage, _),) = spec.method.stages(steps)
    begun = time.perf_counter()
    reference_s = 0.0
    if not way.startswith("stock"):
        pairs = pairs.add_column(REFERENCE, side_log_probs(spec, model, pairs, 0, {}))
        reference_s = time.perf_counter() - begun
    model = stage.attach(model)
    order = PreferenceRows(spec, pairs)
    step_tokens = [order.seen(step).tokens for step in range(steps)]
    stamps: list[tuple[int, float]] = []
    losses: list[float] = []

    def report(metrics: Any, step: int) -> None:
        if device != "cpu":
            torch.cuda.synchronize()
        stamps.append((step, time.perf_counter()))
        losses.append(float(metrics["train_loss"]))

    if device != "cpu":
        gpu_peaks.restart()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        job = Job(spec, stage, steps, 0, Path(work), device, report, lambda: 0.0)
        if way.startswith("stock"):
            reference_s = _stock(spec, job, pairs, model, micro, Path(work), report, precompute="pre" in way)
            passes = way
        else:
            passes = train.train_stage(spec, job, pairs, model, Pad(), rehearse="recorded" in way).passes  # type: ignore[arg-type]
    settled, start = next(stamp for stamp in stamps if stamp[0] >= max(1, steps // 3))
    last, end = stamps[-1]
    result = {
        "way": way,
        "passes": passes,
        "pairs_a_pass": micro,
        "s_per_step": (end - start) / (last - settled),
        "tokens_per_s": sum(step_tokens[settled:last]) / (end - start),
        "first_step_s": stamps[0][1] - begun,
        "reference_s": reference_s,
        "reference_share_of_an_epoch": reference_s / ((end - start) / (last - settled) * steps),
        "losses": losses,
    }
    if device != "cpu":
        result |= {
            "peak_allocated_gib": gpu_peaks.allocated() / GIB,
            "peak_reserved_gib": gpu_peaks.reserved() / GIB,
        }
        if not way.startswith("stock"):
            result["predicted"] = _predicted(spec, pairs, device)
    return result


def _predicted(spec: Any, pairs: Any, device: str) -> dict[str, float]:
    """As `ray-peft plan` predicts it for these pairs."""
    from ray_peft.tasks.llm_sft.bench import trained_lengths
    from ray_peft.tasks.llm_sft.lanes import largest_capacity
    from ray_peft.tasks.llm_sft.memory import predict
    from ray_peft.vram.cards import known
    from ray_peft.vram.shape import ModelShape

    lengths = trained_lengths(spec, pairs)
    longest = max(map(max, lengths))
    if spec.train.cuda_graphs:
        longest = largest_capacity(max(map(sum, lengths)))
    shape = ModelShape.from_config(Path(spec.model.name) / "config.json")
    return predict(spec, shape, longest_tokens=longest, gpu=known(device_name(device) or "")).gib()


def _stock(
    spec: Any, job: Any, pairs: Any, model: Any, micro: int, work: Path, report: Any, *, precompute: bool
) -> float:
    """TRL's DPOTrainer on the same tokens; returns the seconds of computing the reference beforehand."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]

    words = {"<pad>": 0, **{str(number): number for number in range(1, 1000)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "1")), pad_token="<pad>", eos_token="2"
    )
    rows = []
    for row in pairs:
        prompt = sum(label == -100 for label in row["labels"])
        ids, rejected = row["input_ids"], row["rejected_ids"]
        rows.append({"prompt_ids": ids[:prompt], "chosen_ids": ids[prompt:], "rejected_ids": rejected[prompt:]})
    config = DPOConfig(
        output_dir=str(work), max_steps=job.steps, per_device_train_batch_size=micro, max_length=None,
        gradient_accumulation_steps=BATCH // micro, learning_rate=job.stage.lr, weight_decay=0.0, max_grad_norm=1.0,
        logging_steps=spec.train.log_every, logging_first_step=True, gradient_checkpointing=False,
        bf16=spec.train.precision == "bf16", seed=spec.seed, data_seed=spec.seed, save_strategy="no",
        report_to="none", disable_tqdm=True, lr_scheduler_type="constant", beta=spec.train.preference.beta,
        precompute_ref_log_probs=precompute, use_cpu=job.device == "cpu",
    )  # fmt: skip

    class Tokenised(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if "loss" in given["logs"]:
                report({"train_loss": given["logs"]["loss"]}, state.global_step)

    optimizer = job.stage.optimizer(model)
    begun = time.perf_counter()
    trainer = Tokenised(
        model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        optimizers=(optimizer, None),
    )  # fmt: skip
    seconds = time.perf_counter() - begun if precompute else 0.0
    trainer.add_callback(Watch())
    trainer.train()
    trainer.accelerator.free_memory()
    return seconds


def learn(model: str, rows: str, objective: str, steps: int, device: str) -> dict[str, Any]:
    """Train LoRA on real pairs by one objective; scores on the held-out pairs."""
    from ray_peft.tasks.llm_sft.task import LlmSft

    spec = TrialSpec.from_plain(
        {
            "task": "llm_sft",
            "model": {"name": model},
            "data": {
                "sources": [{"recipe": "preference", "path": rows, "train": 1600, "test": 300}],
                "max_length": 384,
                "contamination": {"action": "drop"},
            },
            "method": {"name": "lora", "rank": 16, "lr": 1e-4},
            "train": {
                "steps": steps, "batch_size": 16, "micro_batch_size": 16, "warmup_ratio": 0.1, "log_every": 10,
                "objective": objective, "checkpoint_every": None,
            },
            "evaluation": {"generate": True, "rows": 100, "max_new_tokens": 64, "batch_size": 100},
        }
    )  # fmt: skip
    bench = LlmSft().load(spec, device)
    begun = time.perf_counter()
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as work:
        ((stage, count),) = spec.method.stages(bench.total_steps())
        bench.attach(stage)
        trained = bench.train(
            stage, count, 0, Path(work), lambda metrics, step: losses.append(metrics.get("train_loss", 0.0))
        )
    seconds = time.perf_counter() - begun
    scores = bench.evaluate().scores.plain()
    named = ("eval_loss", "rouge_l", "bleu4", "reward_accuracy", "reward_margin", "preference_loss")
    return {
        "objective": objective, "passes": trained.passes, "train_s": seconds, "losses": losses,
        **{name: scores.get(name) for name in named},
    }  # fmt: skip


def main() -> None:
    """Measure all cases, and write them as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--methods", default="lora,qlora")
    parser.add_argument("--ways", default=";".join(WAYS))
    parser.add_argument("--objectives", default=",".join(OBJECTIVES))
    parser.add_argument("--learn-steps", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no case is begun after so many")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--name", default="preference.json")
    options = parser.parse_args()
    begun = time.perf_counter()
    measured: dict[str, Any] = {"speed": [], "learning": []}
    folder = Path(os.environ["RAY_PEFT_CONFIGS"]).absolute() / MODEL
    cells: list[tuple[str, Any]] = [
        (
            "speed",
            lambda m=method, w=way: (
                {"method": m} | run(folder, METHODS[m], options.micro, options.steps, w, options.device)
            ),
        )
        for method in filter(None, options.methods.split(","))
        for way in options.ways.split(";")
    ]
    model, rows = os.environ.get("RAY_PEFT_MODEL", ""), os.environ.get("RAY_PEFT_PAIRS", "")
    cells += [
        ("learning", lambda o=objective: learn(model, rows, o, options.learn_steps, options.device))
        for objective in filter(None, options.objectives.split(","))
    ]
    for kind, measure in cells:
        if time.perf_counter() - begun > options.seconds:
            break
        try:
            measured[kind].append(measure())
        except Exception as error:  # a cell that fails is a row
            text = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]}
            measured[kind].append(text)
        provenance.write(options.out / options.name, measured)


if __name__ == "__main__":
    main()
