"""One trial on one GPU and on several: the same effective batch, so the same losses; and a sweep over all GPUs.

RAY_PEFT_MODEL=... RAY_PEFT_DATA=... python benchmarks/data_parallel.py benchmarks/results/data_parallel_2xh200.json
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import write

import ray_peft
from ray_peft.console import Console

ROOT = Path(__file__).resolve().parent.parent
SPACE = ROOT / "search_spaces" / "smollm2_dolly_alpaca.yaml"


def losses(folder: Path) -> list[float]:
    """Training losses of a trial's log, in order."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["train_loss"] for line in map(json.loads, lines) if "train_loss" in line]


def main(target: Path) -> None:
    """Run the cases and write the result."""
    import torch

    count = torch.cuda.device_count()
    folder = Path(tempfile.mkdtemp())
    os.environ["RAY_PEFT_OUTPUTS"] = str(folder)
    common = [
        "train.steps=16", "train.epochs=null", "train.warmup_ratio=0.0", "train.log_every=1", "train.eval_every=8",
        "train.micro_batch_size=4", "train.precision=fp32", "model.dtype=float32", "evaluation.generate=false",
    ]  # fmt: skip
    curves: dict[str, Any] = {}
    for method in ("lora", "galore"):
        for workers in (1, count):
            begin = time.perf_counter()
            outcome = ray_peft.sweep(
                SPACE,
                out=folder / f"{method}-{workers}",
                overrides=[*common, f"method={{name: {method}}}", f"resources.num_workers={workers}"],
                console=Console(),
            )
            (result,) = outcome.results
            trial = outcome.folder / "trials" / result.trial_id
            curves[f"{method} on {workers}"] = {
                "status": result.status,
                "error": (result.error or "").splitlines()[:1],
                "wall_s": round(time.perf_counter() - begin, 1),
                "tokens_per_s": result.usage.tokens_per_s,
                "steps_per_s": result.usage.steps_per_s,
                "eval_loss": result.scores.eval_loss,
                "train_losses": losses(trial) if result.status == "finished" else [],
            }
        one, several = (curves[f"{method} on {n}"]["train_losses"] for n in (1, count))
        curves[f"{method}: largest difference of a step's loss"] = max(
            (abs(a - b) for a, b in zip(one, several, strict=False)), default=None
        )
        write(target, {"gpu_count": count, "curves": curves})
    begin = time.perf_counter()
    outcome = ray_peft.sweep(
        SPACE,
        out=folder / "spread",
        overrides=["method={name: lora}", "seed={grid: [0, 1, 2, 3]}", "train.steps=100", "train.epochs=null",
                   "evaluation.generate=false"],
        console=Console(),
    )  # fmt: skip
    starts = [result.provenance.started_at for result in outcome.results]
    spread = {"wall_s": round(time.perf_counter() - begin, 1), "started_at": starts,
              "trial_wall_s": [result.usage.wall_time_s for result in outcome.results]}  # fmt: skip
    write(target, {"gpu_count": count, "curves": curves, "sweep_over_all_gpus": spread})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
