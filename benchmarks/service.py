"""The service on one GPU: a real sweep, the fixed cost of a trial, trials side by side, and a trial that crashes.

RAY_PEFT_MODEL=... RAY_PEFT_DATA=... python benchmarks/service.py benchmarks/results/service_h200.json
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from provenance import write

import ray_peft
from ray_peft.console import Console
from ray_peft.schedule.sweep import SweepOutcome
from ray_peft.trial.result import TrialResult

ROOT = Path(__file__).resolve().parent.parent
SPACE = ROOT / "search_spaces" / "smollm2_dolly_alpaca.yaml"


def row(result: TrialResult) -> dict[str, Any]:
    """What a reader of the benchmark compares."""
    usage = result.usage
    return {
        "trial_id": result.trial_id,
        "status": result.status,
        "scores": result.scores.plain(),
        "usage": usage.plain(),
        "fixed_cost_s": round(usage.wall_time_s - usage.train_s - usage.evaluate_s, 2),
        "trainable_parameters": result.trainable_parameters,
        "adapter_bytes": result.adapter_bytes,
        "train_loss_final": result.train_loss_final,
        "started_at": result.provenance.started_at,
        "error": (result.error or "").splitlines()[:1],
    }


def timed(out: Path, overrides: list[str]) -> tuple[float, SweepOutcome]:
    """Wall seconds of a sweep, and its outcome."""
    begin = time.perf_counter()
    outcome = ray_peft.sweep(SPACE, out=out, overrides=overrides, console=Console())
    return time.perf_counter() - begin, outcome


SHORT = (
    "method={name: lora, rank: 16}",
    "train.steps=5",
    "train.epochs=null",
    "train.warmup_ratio=0.0",
    "evaluation.generate=false",
    "data.sources=[{recipe: dolly, path: '${RAY_PEFT_DATA}/dolly/dolly_12k.jsonl.gz', train: 100, test: 20}]",
)
"""A trial of seconds."""


def main(target: Path, chosen: list[str]) -> None:
    """Run the chosen cases (all by default); the result is written after each, so that a late failure loses nothing."""
    folder = Path(tempfile.mkdtemp())
    os.environ["RAY_PEFT_OUTPUTS"] = str(folder)
    measured: dict[str, Any] = {"space": SPACE.name}
    for name, case in CASES.items():
        if chosen and name not in chosen:
            continue
        print(f"== {name}", flush=True)
        try:
            measured[name] = case(folder / name, target)
        except Exception as error:  # a benchmark reports what failed and goes on
            measured[name] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        write(target, measured)


def whole_sweep(out: Path, target: Path) -> dict[str, Any]:
    """none, lora, qlora and galore on real rows; the report is kept beside the numbers."""
    seconds, outcome = timed(out, [])
    report, _, _ = (outcome.folder / "report.md").read_text(encoding="utf-8").partition("## Samples")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.with_suffix(".report.md").write_text(
        f"{report}The samples are left out here: the rows' licences do not allow them in this repository.\n",
        encoding="utf-8",
    )
    return {"wall_s": round(seconds, 1), "rows": [row(result) for result in outcome.results]}


def eight_short_trials(out: Path, share: float) -> dict[str, Any]:
    """Eight trials of five steps, each on `share` of the GPU."""
    seconds, outcome = timed(
        out, [*SHORT, "seed={grid: [0, 1, 2, 3, 4, 5, 6, 7]}", f"resources.gpus_per_worker={share}"]
    )
    rows = [row(result) for result in outcome.results]
    return {
        "wall_s": round(seconds, 1),
        "status": [each["status"] for each in rows],
        "fixed_cost_s": [each["fixed_cost_s"] for each in rows],
        "trial_wall_s": [round(each["usage"]["wall_time_s"], 1) for each in rows],
        "started_at": [each["started_at"] for each in rows],
    }


def out_of_memory(out: Path, target: Path) -> list[dict[str, Any]]:
    """One trial in one pass of 8,000 long rows, which no GPU holds, beside one that fits: a row each."""
    _, outcome = timed(
        out,
        [*SHORT, "train.batch_size=8000", "train.micro_batch_size={grid: [8000, 8]}", "train.steps=1",
         "data.sources=[{recipe: dolly, path: '${RAY_PEFT_DATA}/dolly/dolly_12k.jsonl.gz', train: 8000, test: 20}]"],
    )  # fmt: skip
    return [row(result) for result in outcome.results]


def single_run(out: Path, target: Path) -> dict[str, Any]:
    """One trial as a TorchTrainer of its own."""
    from ray_peft.space.read import load

    begin = time.perf_counter()
    result = ray_peft.run(load(SPACE, list(SHORT)).trials[0], out=out, console=Console())
    return {"wall_s": round(time.perf_counter() - begin, 1), "row": row(result)}


CASES: dict[str, Callable[[Path, Path], Any]] = {
    "sweep": whole_sweep,
    "one_at_a_time": lambda out, _: eight_short_trials(out, 1.0),
    "four_at_a_time": lambda out, _: eight_short_trials(out, 0.25),
    "out_of_memory": out_of_memory,
    "single_run_as_torch_trainer": single_run,
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
