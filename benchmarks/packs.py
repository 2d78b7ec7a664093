"""Trials that train together on one base, against the same trials one after the other: makespan, steps, memory.

    RAY_PEFT_CONFIGS=configs python benchmarks/packs.py --out results --steps 60

RAY_PEFT_CONFIGS names a folder with gemma-3-1b-it/config.json; weights are random, of the true shape. Rows have
log-normal lengths like Dolly's (mean about 150 tokens), cut at 512. Passes are recorded both ways. A makespan holds
loading, training and saving of all members; "alone" measures each of `--alone` trials and multiplies their mean.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray_peft.engine import gpu_peaks
from ray_peft.foundation.units import GIB
from ray_peft.spec import TrialSpec
from ray_peft.trial import provenance


@dataclass(frozen=True)
class Case:
    """Some trials of one base."""

    method: str
    members: int
    rows: int = 1
    """Rows of each member's step."""
    length: int | None = None
    """Tokens of every row; None draws them."""
    seeds: bool = False
    """Every member has its own order of rows."""
    checkpointing: bool = False

    @property
    def name(self) -> str:
        tokens = f" of {self.length} tokens" if self.length else ""
        other = (", own orders" if self.seeds else "") + (", checkpointing" if self.checkpointing else "")
        return f"{self.members} {self.method}, {self.rows} rows a step{tokens}{other}"


CASES = [
    Case("lora", 8),
    Case("qlora", 16),
    Case("qlora", 8),
    Case("lora", 4),
    Case("lora", 2),
    Case("lora", 8, seeds=True),
    Case("lora", 8, length=512),
    Case("lora", 1),
    Case("lora", 8, rows=8),
    Case("lora", 16),
]


def specs_of(case: Case, model: Path, steps: int) -> list[TrialSpec]:
    """Learning rates times two ranks."""
    return [
        TrialSpec.from_plain(
            {
                "task": "llm_sft",
                "model": {"name": str(model), "random_weights": True},
                "data": {"sources": [{"recipe": "text", "path": "rows.jsonl", "train": 1, "test": 1}]},
                "method": {"name": case.method, "rank": (8, 16)[place % 2], "lr": 1e-4 * (1 + place // 2)},
                "train": {
                    "steps": steps, "batch_size": case.rows, "micro_batch_size": case.rows, "log_every": 1,
                    "gradient_checkpointing": case.checkpointing, "schedule": "constant", "loss": "all",
                },
                "evaluation": {"generate": False},
                "seed": 42 + place * case.seeds,
            }
        )
        for place in range(case.members)
    ]  # fmt: skip


def rows_of(case: Case, steps: int) -> Any:
    """Rows for all steps."""
    import torch
    from datasets import Dataset

    draw = torch.Generator().manual_seed(0)
    lengths = torch.empty(steps * case.rows).log_normal_(4.7, 0.8, generator=draw).round().clamp(16, 512).int().tolist()
    rows = []
    for length in lengths:
        ids = torch.randint(10, 1000, (case.length or length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": ids})
    return Dataset.from_list(rows)


class Watch:
    """Reports of one trial: losses, and when steps were done."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.times: list[float] = []

    def __call__(self, metrics: Any, step: int) -> None:
        self.losses.append(float(metrics["train_loss"]))
        self.times.append(time.perf_counter())


def bench_of(spec: Any, model: Any, rows: Any, device: str) -> Any:
    """A trial's bench on a loaded base."""
    from ray_peft.tasks.llm_sft.bench import LlmBench

    return LlmBench(spec, device, SimpleNamespace(pad_token_id=0), SimpleNamespace(train=rows, key="rows"), model)  # type: ignore[arg-type]


def job_of(spec: Any, folder: Path, report: Any, device: str) -> Any:
    """A trial's only stage."""
    from ray_peft.engine.member import Job

    ((stage, steps),) = spec.method.stages(spec.train.steps)
    return Job(spec, stage, steps, 0, folder, device, report, lambda: 0.0)


def fresh(device: str) -> None:
    """Nothing of an earlier run is left, and peaks begin anew."""
    import torch

    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        gpu_peaks.restart()


def peaks(device: str) -> dict[str, float]:
    """GiB since `fresh`."""

    if device == "cpu":
        return {}
    return {
        "peak_allocated_gib": gpu_peaks.allocated() / GIB,
        "peak_reserved_gib": gpu_peaks.reserved() / GIB,
    }


def alone(spec: Any, rows: Any, folder: Path, device: str) -> dict[str, Any]:
    """One trial by itself: load, attach, train, save."""
    from transformers import set_seed

    from ray_peft.tasks.llm_sft import train
    from ray_peft.tasks.llm_sft.model import load_model

    fresh(device)
    begin = time.perf_counter()
    set_seed(spec.seed)
    bench = bench_of(spec, load_model(spec, device), rows, device)
    loaded = time.perf_counter()
    watch = Watch()
    job = job_of(spec, folder, watch, device)
    bench.attach(job.stage)
    passes = train.train_stage(spec, job, rows, bench.model, bench.tokenizer, rehearse=device != "cpu").passes
    bench.save(folder / "adapter")
    end = time.perf_counter()
    return {
        "seconds": end - begin, "load_s": loaded - begin, "passes": passes, "s_per_step": steady(watch.times),
        "losses": watch.losses[:: max(1, len(watch.losses) // 10)], **peaks(device),
    }  # fmt: skip


def steady(times: list[float]) -> float:
    """Seconds of a step, without the first half, in which shapes are recorded.

    Args:
        times: when steps were done, of the first of several members: before any of them is saved.
    """
    half = len(times) // 2
    return (times[-1] - times[half]) / max(1, len(times) - 1 - half)


def packed(specs: list[Any], rows: Any, folder: Path, device: str) -> dict[str, Any]:
    """All trials on one base."""
    from transformers import set_seed

    from ray_peft.tasks.llm_sft.model import load_model
    from ray_peft.tasks.llm_sft.pack import Pack

    fresh(device)
    begin = time.perf_counter()
    set_seed(specs[0].seed)
    model = load_model(specs[0], device)
    loaded = time.perf_counter()
    benches = [bench_of(spec, model, rows, device) for spec in specs]
    watches = [Watch() for _ in specs]
    passes: list[str] = []
    failures: list[str] = []

    def ended(bench: Any, member: Any, error: Exception | None) -> None:
        if error is not None:
            failures.append(f"{type(error).__name__}: {error}")
            return
        passes.append(member.trained.passes)
        bench.save(folder / str(benches.index(bench)))

    jobs = [
        job_of(spec, folder / f"job{place}", watch, device)
        for place, (spec, watch) in enumerate(zip(specs, watches, strict=True))
    ]
    pack = Pack(benches, jobs, len(specs), ended)
    started = time.perf_counter()
    pack.run()
    end = time.perf_counter()
    return {
        "seconds": end - begin, "load_s": loaded - begin, "prepare_s": started - loaded, "train_s": end - started,
        "passes": sorted(set(passes)), "failures": failures, "s_per_round": steady(watches[0].times),
        "losses": watches[0].losses[:: max(1, len(watches[0].losses) // 10)], **peaks(device),
    }  # fmt: skip


def measured(
    case: Case, model: Path, steps: int, device: str, references: int, known: dict[str, Any]
) -> dict[str, Any]:
    """A case both ways; trials alone that differ in nothing that costs time are measured once."""
    rows, specs = rows_of(case, steps), specs_of(case, model, steps)
    kind = f"{case.method}, {case.rows} rows of {case.length}, {case.checkpointing}"
    with tempfile.TemporaryDirectory() as work:
        if kind not in known:
            known[kind] = [
                alone(spec, rows, Path(work) / f"alone{n}", device) for n, spec in enumerate(specs[:references])
            ]
        pack = packed(specs, rows, Path(work), device)
    each = sum(run["seconds"] for run in known[kind]) / len(known[kind])
    step = min(run["s_per_step"] for run in known[kind])
    count = case.members
    return {
        "alone": known[kind],
        "pack": pack,
        "makespan_alone_s": each * count,
        "makespan_pack_s": pack["seconds"],
        "makespan_ratio": each * count / pack["seconds"],
        "trial_steps_per_s_alone": 1 / step,
        "trial_steps_per_s_pack": count / pack["s_per_round"],
        "steps_ratio": step * count / pack["s_per_round"],
    }


def main() -> None:
    """Measure all cases, and write them as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--alone", type=int, default=1)
    parser.add_argument("--cases", default="", help="numbers of cases, such as 0,3; default: all")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--within", type=float, default=1e9, help="seconds after which no further case begins")
    options = parser.parse_args()
    begin = time.perf_counter()
    model = Path(os.environ["RAY_PEFT_CONFIGS"]).absolute() / "gemma-3-1b-it"
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [int(number) for number in options.cases.split(",") if number] or range(len(CASES))
    results: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": provenance.device_name(options.device),
        "versions": provenance.versions(),
        "command": f"packs.py --steps {options.steps} --alone {options.alone} --cases {options.cases or 'all'}",
        "cases": {},
    }
    known: dict[str, Any] = {}
    warm = Case("lora", 1)
    with tempfile.TemporaryDirectory() as work:  # libraries, kernels, random weights on disk
        alone(specs_of(warm, model, 3)[0], rows_of(warm, 3), Path(work), options.device)
    for number in chosen:
        case = CASES[number]
        if time.perf_counter() - begin > options.within:
            results["cases"][case.name] = {"left_out": "no time was left"}
            continue
        try:
            cell = measured(case, model, options.steps, options.device, options.alone, known)
        except Exception as error:  # a case that fails is a row
            cell = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2500:]}
        results["cases"][case.name] = cell
        print(f"{time.perf_counter() - begin:.0f} s", case.name, json.dumps(cell), flush=True)
        (options.out / "packs.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
