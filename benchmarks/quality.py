"""Every method beside the stock pipeline on the same rows: real weights, real instructions, one GPU.

With RAY_PEFT_MODEL and RAY_PEFT_ALPACA set, in turn:
    python benchmarks/quality.py stock FOLDER
    python benchmarks/quality.py ours FOLDER [KEY=VALUE ...]
    python benchmarks/quality.py compare FOLDER benchmarks/results/quality_h200.json

`stock` trains with TRL's SFTTrainer, PEFT and galore-torch as their documentation shows; `ours` runs the search space
smollm2_alpaca; `compare` reads both from FOLDER. Both use the same prepared rows, schedule, steps and evaluation.
Several trials share the GPU, so memory and scores compare, and times only roughly.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from provenance import write

ROOT = Path(__file__).resolve().parent.parent
SPACE = ROOT / "search_spaces" / "smollm2_alpaca.yaml"
SHARE = 0.125
"""Of a GPU for each of our trials."""
STOCK = ("lora", "qlora", "galore", "full", "hybrid")
HYBRID_SWITCH = 2 / 3
COUNTERPART = {
    "lora": "lora", "qlora": "qlora", "galore": "galore weights=bfloat16_stochastic",
    "full": "full weights=bfloat16_stochastic", "hybrid": "qlora_galore",
}  # fmt: skip


def main(what: str, folder: Path, rest: list[str]) -> None:
    """Run one part."""
    folder.mkdir(parents=True, exist_ok=True)
    if what == "stock":
        parts = {
            name: subprocess.Popen(
                [sys.executable, __file__, f"stock:{name}", str(folder)],
                stdout=(folder / f"stock_{name}.log").open("w"),
                stderr=subprocess.STDOUT,
            )
            for name in STOCK
        }
        print({name: part.wait() for name, part in parts.items()}, flush=True)
    elif what.startswith("stock:"):
        row = stock(what.partition(":")[2], folder)
        (folder / f"stock_{row['name']}.json").write_text(json.dumps(row), encoding="utf-8")
    elif what == "ours":
        import ray_peft
        from ray_peft.console import Console

        overrides = [f"resources.gpus_per_worker={SHARE}", "resources.cpus_per_worker=2", "evaluation.samples=0"]
        ray_peft.sweep(SPACE, out=folder / "ours", overrides=[*overrides, *rest], console=Console())
    else:
        write(Path(*rest), compare(folder))


def stock(name: str, folder: Path) -> dict[str, Any]:
    """One row of the stock pipeline."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, set_seed
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.utils import add_fused_lm_head

    from ray_peft.foundation.units import GIB
    from ray_peft.metrics.text_scores import bleu4, rouge_l
    from ray_peft.reach.targets import PROJECTIONS
    from ray_peft.space.read import load
    from ray_peft.tasks.llm_sft import data, evaluate
    from ray_peft.tasks.llm_sft.task import LlmSft

    spec = load(SPACE).trials[0]
    tokenizer = data.load_tokenizer(spec)
    prepared = data.prepare(spec, tokenizer)
    rows = prepared.train.select_columns(["input_ids", "labels"])
    steps = LlmSft().total_steps(spec, len(rows))
    set_seed(spec.seed)

    def base(quantised: bool) -> Any:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            spec.model.name, dtype=torch.bfloat16, device_map={"": 0},
            quantization_config=quantisation if quantised else None,
        )  # fmt: skip
        add_fused_lm_head(model)  # for the evaluation alone
        return model

    def train(model: Any, count: int, lr: float, adapter: bool, **settings: Any) -> Any:
        arguments = SFTConfig(
            output_dir=str(folder / f"stock_{name}"), max_steps=count, per_device_train_batch_size=16, learning_rate=lr,
            lr_scheduler_type="cosine", warmup_steps=0.03, gradient_checkpointing=False, seed=spec.seed,
            data_seed=spec.seed, save_strategy="no", report_to="none", max_length=None, disable_tqdm=True, **settings,
        )  # fmt: skip
        peft = LoraConfig(r=16, lora_alpha=32, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=peft if adapter else None
        )
        trainer.train()
        return trainer.model

    galore = {
        "optim": "galore_adamw",
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": "rank=128, update_proj_gap=200, scale=0.25, proj_type=std",
    }
    paged = {"optim": "paged_adamw_8bit"}
    model = base(name in ("qlora", "hybrid"))
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    if name == "lora":
        model = train(model, steps, 2e-4, adapter=True)
    elif name == "qlora":
        model = train(model, steps, 2e-4, adapter=True, **paged)
    elif name == "galore":
        model = train(model, steps, 1e-4, adapter=False, **galore)
    elif name == "full":
        model = train(model, steps, 2e-5, adapter=False)
    else:
        first = round(steps * HYBRID_SWITCH)
        adapted = train(model, first, 2e-4, adapter=True, **paged)
        adapted.save_pretrained(folder / "stock_hybrid_adapter")
        from peft import PeftModel

        plain = base(quantised=True).dequantize()
        merged = PeftModel.from_pretrained(plain, str(folder / "stock_hybrid_adapter")).merge_and_unload()
        merged = merged.to(torch.bfloat16).requires_grad_(True)
        model = train(merged, steps - first, 1e-4, adapter=False, **galore)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() / GIB
    predictions = evaluate.answers(spec, model, tokenizer, prepared.test)
    references = list(prepared.test["reference"])
    return {
        "name": name,
        "eval_loss": -float(evaluate.token_log_probs(spec, model, prepared.test, tokenizer.pad_token_id).mean()),
        "bleu4": bleu4(predictions, references),
        "rouge_l": rouge_l(predictions, references),
        "peak_allocated_gib": peak,
        "train_s": seconds,
        "steps": steps,
        "predictions": predictions,
        "references": references,
    }


def compare(folder: Path) -> dict[str, Any]:
    """Our rows, the stock rows, and ours less stock with 95 % intervals over the held-out rows."""
    from ray_peft.metrics.intervals import bleu4_difference, mean_difference
    from ray_peft.metrics.text_scores import bleu_row_statistics, rouge_l_rows
    from ray_peft.report.labels import labels
    from ray_peft.store.results_file import read_results

    ours = read_results(folder / "ours")
    names = labels({row.trial_id: row.spec for row in ours}, without=("seed",))
    names = {trial_id: name.partition(" (")[0] for trial_id, name in names.items()}
    listed = [
        {
            "trial": names[row.trial_id],
            "seed": row.spec.seed,
            "status": row.status,
            "arithmetic": row.arithmetic,
            **{key: value for key, value in row.scores.plain().items() if value is not None},
            "peak_allocated_gib": row.usage.peak_allocated_gib,
            "train_s": row.usage.train_s,
            "evaluate_s": row.usage.evaluate_s,
            "trainable_parameters": row.trainable_parameters,
            "boundary_losses": row.boundary_losses,
            "members": list(row.members.values()),
        }
        for row in ours
    ]
    stocks, differences = [], []
    for name in STOCK:
        path = folder / f"stock_{name}.json"
        if not path.is_file():
            continue
        row = json.loads(path.read_text(encoding="utf-8"))
        predictions, references = row.pop("predictions"), row.pop("references")
        stocks.append(row)
        for own in ours:
            if names[own.trial_id] != COUNTERPART[name]:
                continue
            lines = (folder / "ours" / "trials" / own.trial_id / "answers.jsonl").read_text(encoding="utf-8")
            answers = [json.loads(line) for line in lines.split("\n") if line]
            given = [answer["prediction"] for answer in answers]
            assert [answer["reference"] for answer in answers] == references
            rouge = mean_difference(rouge_l_rows(given, references), rouge_l_rows(predictions, references))
            bleu = bleu4_difference(
                bleu_row_statistics(given, references), bleu_row_statistics(predictions, references)
            )
            differences.append(
                {
                    "method": name,
                    "seed": own.spec.seed,
                    "eval_loss": (own.scores.eval_loss or 0.0) - row["eval_loss"],
                    "rouge_l": [rouge.difference, rouge.low, rouge.high],
                    "bleu4": [bleu.difference, bleu.low, bleu.high],
                }
            )
    return {"space": SPACE.name, "ours": listed, "stock": stocks, "ours_minus_stock": differences}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
