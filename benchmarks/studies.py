"""Every row of both studies on their true model shapes, with few steps: parameters, peak memory and speed.

With RAY_PEFT_GEMMA2, RAY_PEFT_GEMMA3, RAY_PEFT_DOLLY, RAY_PEFT_ALPACA, RAY_PEFT_TULU and RAY_PEFT_ULTRACHAT set:
    python benchmarks/studies.py FOLDER benchmarks/results/studies_h200.json

The models are folders with config.json and tokenizer; their weights are random, so scores say nothing and are left out.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

from provenance import write

import ray_peft
from ray_peft.console import Console

ROOT = Path(__file__).resolve().parent.parent
STEPS = 10
SHORT = ["model.random_weights=true", "train.epochs=null", f"train.steps={STEPS}", "train.log_every=2"]
SOURCES = (
    "data.sources=[{recipe: alpaca, path: '${RAY_PEFT_ALPACA}', train: 1000, validation: 50, test: 50}, "
    "{recipe: tulu, path: '${RAY_PEFT_TULU}', train: 1000, validation: 50, test: 50}, "
    "{recipe: ultrachat, path: '${RAY_PEFT_ULTRACHAT}', train: 1000, validation: 50, test: 50}]"
)
ANSWERS = ["evaluation.rows=16", "evaluation.max_new_tokens=32", "evaluation.samples=0"]
SPACES = {
    "gemma2_dolly_lora_qlora": SHORT,
    "gemma3_qlora_galore": [*SHORT, SOURCES, *ANSWERS],
    "gemma3_hybrid": [*SHORT, SOURCES, *ANSWERS],
    "gemma3_ensemble": [*SHORT, SOURCES, *ANSWERS],
}


def main(folder: Path, target: Path) -> None:
    """Run every space; the result is written after each, so that a late failure loses nothing."""
    measured: dict[str, Any] = {"steps": STEPS}
    for name, overrides in SPACES.items():
        # The Gemma-3 spaces share their rows, so with one folder a trial of several spaces runs once.
        out = folder / name.partition("_")[0]
        try:
            outcome = ray_peft.sweep(
                ROOT / "search_spaces" / f"{name}.yaml", out=out, overrides=overrides, console=Console()
            )
            measured[name] = [row(result) for result in outcome.results]
        except Exception as error:  # a benchmark reports what failed and goes on
            measured[name] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        write(target, measured)


def row(result: ray_peft.TrialResult) -> dict[str, Any]:
    """What a reader of the studies compares."""
    spec, usage = result.spec, result.usage
    return {
        "trial_id": result.trial_id,
        "method": spec.method.name,
        "max_length": spec.data.max_length,
        "arithmetic": result.arithmetic,
        "status": result.status,
        "error": (result.error or "").splitlines()[:1],
        "steps": result.steps,
        "trainable_parameters": result.trainable_parameters,
        "total_parameters": result.total_parameters,
        "peak_allocated_gib": usage.peak_allocated_gib,
        "peak_reserved_gib": usage.peak_reserved_gib,
        "spilled_gib": usage.spilled_gib,
        "steps_per_s": usage.steps_per_s,
        "tokens_per_s": usage.tokens_per_s,
        "train_s": usage.train_s,
        "evaluate_s": usage.evaluate_s,
        "adapter_bytes": result.adapter_bytes,
        "boundary_losses": result.boundary_losses,
        "members": list(result.members.values()),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
