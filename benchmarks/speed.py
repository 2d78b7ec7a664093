"""Training speed of text trials on a GPU: recorded passes, passes as they are, and TRL's SFTTrainer, in one session.

    RAY_PEFT_CONFIGS=configs python benchmarks/speed.py --out results --steps 30

RAY_PEFT_CONFIGS names a folder of folders that hold config.json alone; weights are random, of the true shape. Rows
have log-normal lengths like Dolly's (mean about 150 tokens), cut at the case's limit; half of each carries loss.
`capped` trains under each memory cap of a case, with what `train.fit: auto` chooses for it; `free` with what it chooses
for the whole GPU. The last tenth of the steps runs under the profiler, apart from the timed ones: `gpu_busy` is the
share of its time in which a kernel or a copy ran, and `gpu` says where the rest went (gpu_profile.py). `stock` takes
`--stock-steps` steps, each of the study's passes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gpu_profile

from ray_peft.foundation.units import GIB
from ray_peft.spec import TrialSpec
from ray_peft.trial import provenance


@dataclass(frozen=True)
class Case:
    """One setting of a study."""

    model: str
    method: dict[str, Any]
    batch: int
    micro: int
    tokens: int
    checkpointing: bool = False
    precision: str = "bf16"
    caps: tuple[float, ...] = ()
    """GiB of the GPU that trials may take, the CUDA context included."""

    @property
    def name(self) -> str:
        recomputed = ", checkpointing" if self.checkpointing else ""
        dropped = f", dropout {self.method['dropout']:g}" if self.method.get("dropout") else ""
        size = f"{self.batch} rows a step, {self.tokens} tokens"
        return f"{self.model} {self.method['name']}, {size}{recomputed}{dropped}"


LORA, QLORA = {"name": "lora", "rank": 16}, {"name": "qlora", "rank": 16}
GALORE = {"name": "galore", "rank": 128, "update_proj_gap": 200}
FULL = {"name": "full"}
CASES = [
    Case("gemma-3-1b-it", LORA, 8, 8, 512),
    Case("gemma-3-1b-it", QLORA, 8, 8, 512),
    Case("gemma-2-2b", LORA, 8, 8, 512, caps=(12.0,)),
    Case("gemma-2-2b", QLORA, 8, 8, 512, caps=(8.0,)),
    Case("gemma-3-1b-it", QLORA, 16, 16, 2048, checkpointing=True, caps=(6.0, 3.0)),
    Case("gemma-3-1b-it", LORA, 1, 1, 512),
    Case("smollm2-135m", LORA, 16, 16, 512),
    Case("smollm2-135m", FULL, 16, 16, 512),
    Case("gemma-3-1b-it", LORA | {"dropout": 0.05}, 8, 8, 512),
    Case("gemma-3-1b-it", LORA | {"dropout": 0.05}, 8, 8, 512, checkpointing=True),
]
STOCK_MICRO = {8: 1, 16: 4, 1: 1}
"""Rows of a pass in the studies' own settings."""


def spec_of(case: Case, folder: Path, steps: int, **train: Any) -> TrialSpec:
    """The case as a trial."""
    settings = {
        "steps": steps, "batch_size": case.batch, "micro_batch_size": case.micro, "precision": case.precision,
        "gradient_checkpointing": case.checkpointing, "log_every": max(1, steps // 10), "schedule": "constant", **train,
    }  # fmt: skip
    return TrialSpec.from_plain(
        {
            "task": "llm_sft",
            "model": {"name": str(folder / case.model), "random_weights": True},
            "data": {"sources": [{"recipe": "text", "path": "rows.jsonl", "train": 1, "test": 1}]},
            "method": case.method,
            "train": {"loss": "answers", **settings} | {"loss": "all"},
            "evaluation": {"generate": False},
        }
    )


def rows_of(case: Case, steps: int) -> Any:
    """Rows for all steps."""
    import torch
    from datasets import Dataset

    draw = torch.Generator().manual_seed(0)
    count = steps * case.batch
    lengths = torch.empty(count).log_normal_(4.7, 0.8, generator=draw).round().clamp(16, case.tokens).int().tolist()
    rows = []
    for length in lengths:
        ids = torch.randint(10, 1000, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return Dataset.from_list(rows)


class Pad:
    """All that a loop asks of a tokenizer."""

    pad_token_id = 0


def run(case: Case, folder: Path, steps: int, way: str) -> dict[str, Any]:
    """Train a case one way; speed without the first third, memory of all."""
    import torch
    from transformers import set_seed

    from ray_peft.engine import gpu_peaks
    from ray_peft.engine.member import Job
    from ray_peft.tasks.llm_sft import train
    from ray_peft.tasks.llm_sft.model import load_model

    stock = way == "stock"
    if stock:
        case = replace(case, micro=STOCK_MICRO[case.batch])
    set_seed(0)
    left = released()
    spec = spec_of(case, folder, steps, cuda_graphs=way not in ("stock", "plain"))
    predicted = None
    if way == "free" or way.startswith("under "):
        spec, predicted = _fitted(spec, case, folder, float(way.split()[1]) if way != "free" else None)
    model = load_model(spec, "cuda:0")
    ((stage, _),) = spec.method.stages(steps)
    model = stage.attach(model)
    rows = rows_of(case, steps)
    stamps: list[tuple[int, float]] = []
    losses: list[float] = []

    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    every = spec.train.log_every
    profiled = every * (steps // every - 1)  # both ends are logged

    def report(metrics: Any, step: int) -> None:
        torch.cuda.synchronize()
        stamps.append((step, time.perf_counter()))
        losses.append(float(metrics["train_loss"]))
        if step == profiled:
            profile.start()
        elif step == profiled + every:
            profile.stop()

    gpu_peaks.restart()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        job = Job(spec, stage, steps, 0, Path(work), "cuda:0", report, lambda: 0.0)
        if stock:
            passes = _stock(spec, job, rows, model, case, Path(work), report)
        else:
            passes = train.train_stage(spec, job, rows, model, Pad(), rehearse=way == "recorded").passes  # type: ignore[arg-type]
    settled, start = next(stamp for stamp in stamps if stamp[0] >= max(1, steps // 3))
    last, end = next(stamp for stamp in stamps if stamp[0] == profiled)
    seconds = end - start
    order = _tokens(spec, rows)
    profiled_gpu = gpu_profile.summary(profile, every)
    result = {
        "way": way,
        "passes": passes,
        "rows_a_pass": spec.train.micro_batch_size,
        "checkpointing": spec.train.gradient_checkpointing,
        "gpu_busy": profiled_gpu and profiled_gpu["busy"],
        "gpu": profiled_gpu,
        "predicted": predicted,
        "s_per_step": seconds / (last - settled),
        "tokens_per_s": sum(order[settled:last]) / seconds,
        "first_step_s": stamps[0][1] - begin,
        "allocated_before_gib": left,
        "peak_allocated_gib": gpu_peaks.allocated() / GIB,
        "peak_reserved_gib": gpu_peaks.reserved() / GIB,
        "losses": [losses[0], losses[len(losses) // 2], losses[-1]],
    }
    del model
    return result


def released() -> float:
    """Give all memory back; returns what is still allocated [GiB]."""
    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()  # one a stream (32 MiB), which would count for the next case
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() / GIB


def _fitted(spec: TrialSpec, case: Case, folder: Path, cap_gib: float | None) -> tuple[TrialSpec, dict[str, float]]:
    """The trial with what `train.fit: auto` chooses, and its prediction; this process is held to `cap_gib`."""
    import torch

    from ray_peft.tasks.llm_sft.memory import predict
    from ray_peft.vram.cards import known
    from ray_peft.vram.nearest import choose
    from ray_peft.vram.shape import ModelShape

    gpu = known(provenance.device_name("cuda:0") or "")
    shape = ModelShape.from_config(folder / case.model / "config.json")
    room = cap_gib or gpu.memory_gib

    def prediction(variant: TrialSpec) -> Any:
        return predict(variant, shape, longest_tokens=case.tokens, padded=True, gpu=gpu)  # type: ignore[arg-type]

    chosen = choose(spec, prediction, lambda peak: gpu.holds(peak.peak_reserved, memory_gib=room))
    if cap_gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((cap_gib * GIB - gpu.context) / total)
    fitted = spec.changed(chosen)
    return fitted, prediction(fitted).gib()


def _tokens(spec: Any, rows: Any) -> list[int]:
    from ray_peft.tasks.llm_sft.steps import TextRows

    data = TextRows(spec, rows)
    return [data.seen(step).tokens for step in range(spec.train.steps)]


def _stock(spec: Any, job: Any, rows: Any, model: Any, case: Case, work: Path, report: Any) -> str:
    """TRL's SFTTrainer as the studies call it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])), pad_token="a", eos_token="a"
    )
    config = SFTConfig(
        output_dir=str(work), max_steps=job.steps, per_device_train_batch_size=case.micro,
        gradient_accumulation_steps=case.batch // case.micro, learning_rate=job.stage.lr, 
        logging_steps=max(1, job.steps // 10), logging_first_step=True,
        gradient_checkpointing=case.checkpointing, bf16=True, seed=spec.seed, data_seed=spec.seed, save_strategy="no",
        max_length=None, packing=False, report_to="none", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if "loss" in given["logs"]:
                report({"train_loss": given["logs"]["loss"]}, state.global_step)

    labelled = rows.map(lambda row: {"labels": row["input_ids"]}, keep_in_memory=True)
    optimizer = job.stage.optimizer(model)
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=labelled, processing_class=tokenizer, optimizers=(optimizer, None)
    )
    trainer.add_callback(Watch())
    trainer.train()
    trainer.accelerator.free_memory()
    return "stock"


def main() -> None:
    """Measure all cases, and write them as they come."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--stock-steps", type=int, default=None, help="default: as many as the others")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no case is begun after so many")
    parser.add_argument("--name", default="speed.json")
    parser.add_argument("--cases", default="", help="numbers of cases, such as 0,3; default: all")
    parser.add_argument("--ways", default="stock,plain,recorded")
    options = parser.parse_args()
    folder = Path(os.environ["RAY_PEFT_CONFIGS"]).absolute()
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [int(number) for number in options.cases.split(",") if number] or range(len(CASES))
    begin = time.perf_counter()
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": provenance.device_name("cuda:0"),
        "versions": provenance.versions(),
        "command": f"speed.py --steps {options.steps} --cases {options.cases or 'all'} --ways {options.ways}",
        "cases": {},
    }
    for number in chosen:
        case = CASES[number]
        ways = [way for way in options.ways.split(",") if way != "capped"]
        if "capped" in options.ways:
            ways += [f"under {cap:g} GiB" for cap in case.caps]
        for way in ways:
            if time.perf_counter() - begin > options.seconds:
                break
            steps = options.stock_steps if way == "stock" and options.stock_steps else options.steps
            try:
                cell = run(case, folder, steps, way)
            except Exception as error:  # a cell that fails is a row
                cell = {
                    "way": way,
                    "error": f"{type(error).__name__}: {error}",
                    "trace": traceback.format_exc()[-1500:],
                }
            torch.cuda.set_per_process_memory_fraction(1.0)
            found["cases"].setdefault(case.name, []).append(cell)
            shown = {k: v for k, v in cell.items() if k != "trace"}
            print(case.name, json.dumps(shown), flush=True)
            (options.out / options.name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
