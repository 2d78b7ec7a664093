"""Several GPUs of one node: the speed of one data-parallel trial, and the makespan of a sweep, against one GPU.

    RAY_PEFT_MODEL=gemma-3-1b-it RAY_PEFT_DOLLY=dolly.jsonl.gz python benchmarks/scaling.py --out results/scaling.json

RAY_PEFT_MODEL names a folder with config.json and tokenizer; weights are random, of the true shape, and rows are as
long as the limit. Every run is a process of its own that sees the first GPU alone or all of them. A trial's speed is
the median over the second half of its logged steps; a makespan is that of `ray_peft.sweep`, its own Ray included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from pack_sweeps import long_rows
from provenance import write

TOKENS, BATCH, LOG_EVERY = 512, 32, 2
TRIALS = {
    "lora, 4 rows a pass": ({"name": "lora", "rank": 16}, 4),
    "lora, 8 rows a pass": ({"name": "lora", "rank": 16}, 8),
    "full, 8 rows a pass": ({"name": "full"}, 8),
}
"""The method and the micro-batch of the trials whose speed is compared; a step has `BATCH` rows in all."""


def space(kind: str, workers: int, steps: int, model: str, rows: str) -> dict[str, Any]:
    """A search space: one trial on `workers` GPUs, or a sweep of four trials with one GPU each."""
    import torch

    method, micro = TRIALS.get(kind, ({"name": "lora", "rank": {"grid": [4, 8, 16, 32]}}, 8))
    return {
        "name": "scaling",
        "model": {"name": model, "random_weights": True},
        "data": {
            "sources": [{"recipe": "text", "path": rows, "train": 200, "test": 16}],
            "max_length": TOKENS, "contamination": {"action": "allow"},
        },
        "method": method,
        "train": {
            "steps": steps, "batch_size": BATCH if kind in TRIALS else 8, "micro_batch_size": micro, "loss": "all",
            "schedule": "constant", "log_every": LOG_EVERY,
        },
        "evaluation": {"generate": False},
        "resources": {
            "num_workers": workers if kind in TRIALS else 1, "gpus_per_worker": int(torch.cuda.is_available()),
        },
    }  # fmt: skip


def one_run(kind: str, gpus: int, steps: int, work: Path) -> dict[str, Any]:
    """A sweep in this process, which sees `gpus` GPUs."""
    import ray_peft
    from ray_peft.console import Console
    from ray_peft.trial.speed import points_of

    folder = work / f"{kind.replace(', ', '_').replace(' ', '_')}_{gpus}"
    folder.mkdir(parents=True)
    rows = long_rows(folder, os.environ["RAY_PEFT_DOLLY"])
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(space(kind, gpus, steps, os.environ["RAY_PEFT_MODEL"], rows)), encoding="utf-8")
    begin = time.perf_counter()
    outcome = ray_peft.sweep(path, out=folder / "out", console=Console())
    seconds = time.perf_counter() - begin
    trials = []
    for result in outcome.results:
        log = outcome.folder / "trials" / result.trial_id / "metrics.jsonl"
        points = [point for point in points_of(log) if "train_loss" in point[2]]
        times = [
            (after[1] - before[1]) / (after[0] - before[0]) for before, after in zip(points, points[1:], strict=False)
        ]
        trials.append({
            "status": result.status, "error": (result.error or "")[-1500:], "passes": result.passes,
            "s_per_step": median(times[len(times) // 2 :]) if times else None,
            "peak_reserved_gib": result.usage.peak_reserved_gib, "wall_time_s": result.usage.wall_time_s,
            "train_losses": [point[2]["train_loss"] for point in points],
        })  # fmt: skip
    return {"makespan_s": seconds, "trials": trials}


def main() -> None:
    """Run every kind on one GPU and on all, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", default=[*TRIALS, "sweep"])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--sweep-steps", type=int, default=400)
    parser.add_argument("--gpus", type=int, nargs=2, default=(1, 2), help="one, and several")
    parser.add_argument("--work", type=Path, help="where the sweeps are; left behind")
    parser.add_argument("--one-run", nargs=2, metavar=("KIND", "GPUS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp())
    if options.one_run:
        kind, gpus = options.one_run[0], int(options.one_run[1])
        options.out.write_text(json.dumps(one_run(kind, gpus, options.steps, work)), encoding="utf-8")
        return
    cells: dict[str, Any] = {}
    for kind in options.kinds:
        steps = options.steps if kind in TRIALS else options.sweep_steps
        cell = cells.setdefault(kind, {"steps": steps})
        for gpus in options.gpus:
            target = work / "run.json"
            target.unlink(missing_ok=True)
            command = [sys.executable, __file__, "--out", target, "--work", work, "--steps", str(steps)]
            visible = {"CUDA_VISIBLE_DEVICES": ",".join(str(place) for place in range(gpus))}
            log = subprocess.run(
                [*command, "--one-run", kind, str(gpus)], env=os.environ | visible, capture_output=True, text=True,
            )  # fmt: skip
            cell[f"{gpus} GPUs"] = (
                json.loads(target.read_text(encoding="utf-8"))
                if target.is_file()
                else {"error": (log.stdout + log.stderr)[-2500:]}
            )
        cell["speed_up"] = speed_up(kind, *(cell[f"{gpus} GPUs"] for gpus in options.gpus))
        write(options.out, {"tokens_a_row": TOKENS, "rows_a_step": BATCH, "cells": cells})


def speed_up(kind: str, single: dict[str, Any], several: dict[str, Any]) -> float | None:
    """Seconds on one GPU over seconds on several: of a step of a trial, of the makespan of a sweep."""
    if "error" in single or "error" in several:
        return None
    if kind not in TRIALS:
        return single["makespan_s"] / several["makespan_s"]
    steps = [run["trials"][0]["s_per_step"] for run in (single, several)]
    return steps[0] / steps[1] if all(steps) else None


if __name__ == "__main__":
    main()
