"""The service on one GPU: a real sweep, the fixed cost of a trial, trials side by side, and a trial that crashes.

RAY_PEFT_MODEL=... RAY_PEFT_DATA=... python benchmarks/service.py benchmarks/results/service_h200.json
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import write

import ray_peft
from ray_peft.console import Console
from ray_peft.result import TrialResult
from ray_peft.sweep import SweepOutcome

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


def main(target: Path) -> None:
    """Run the cases and write the result."""
    folder = Path(tempfile.mkdtemp())
    os.environ["RAY_PEFT_OUTPUTS"] = str(folder)
    measured: dict[str, Any] = {"space": SPACE.name}
    seconds, outcome = timed(folder / "sweep", [])
    measured["sweep"] = {"wall_s": round(seconds, 1), "rows": [row(result) for result in outcome.results]}
    target.parent.mkdir(parents=True, exist_ok=True)
    for name in ("report.md", "report.csv"):
        (target.parent / f"{target.stem}.{name}").write_bytes((outcome.folder / name).read_bytes())

    # Eight short trials: one at a time on the whole GPU, then four at a time on a quarter each.
    short = ["method={name: lora, rank: 16}", "train.steps=5", "train.epochs=null", "evaluation.generate=false",
             "data.sources=[{recipe: dolly, path: '${RAY_PEFT_DATA}/dolly/dolly_12k.jsonl.gz', train: 100, test: 20}]"]
    for case, share in (("one_at_a_time", 1.0), ("four_at_a_time", 0.25)):
        seconds, outcome = timed(
            folder / case, [*short, "seed={grid: [0, 1, 2, 3, 4, 5, 6, 7]}", f"resources.gpus_per_worker={share}"]
        )
        rows = [row(result) for result in outcome.results]
        measured[case] = {"wall_s": round(seconds, 1), "fixed_cost_s": [each["fixed_cost_s"] for each in rows],
                          "wall_time_s": [round(each["usage"]["wall_time_s"], 1) for each in rows]}

    # A learning rate that diverges, and a trial that needs more memory than the GPU has: rows, and the others finish.
    seconds, outcome = timed(
        folder / "broken",
        [*short, "train.batch_size=4096", "train.micro_batch_size={grid: [4, 4096]}", "train.steps=1",
         "data.sources=[{recipe: dolly, path: '${RAY_PEFT_DATA}/dolly/dolly_12k.jsonl.gz', train: 8000, test: 20}]"],
    )  # fmt: skip
    measured["broken"] = [row(result) for result in outcome.results]
    single = time.perf_counter()
    result = ray_peft.run(outcome_spec(outcome), out=folder / "single", console=Console())
    measured["single_run_as_torch_trainer"] = {"wall_s": round(time.perf_counter() - single, 1), "row": row(result)}
    write(target, measured)


def outcome_spec(outcome: SweepOutcome) -> Any:
    """The first trial of a sweep, made short."""
    plain = outcome.results[0].spec.plain()
    plain["train"] |= {"batch_size": 16, "micro_batch_size": 16, "steps": 10}
    return plain


if __name__ == "__main__":
    main(Path(sys.argv[1]))
