"""What trials cost beside training and evaluation: several on one base, one after the other in a process, as a sweep's.

    RAY_PEFT_MODEL=folder python benchmarks/fixed_cost.py --out results --methods lora,lora,qlora,qlora

RAY_PEFT_MODEL is a folder with config.json and tokenizer; without weights they are random, of the true shape. Each
trial trains for three steps of 8 short rows, scores 8 rows by their loss and is kept in an MLflow store of its own.
`fixed_s` is what a trial takes in all, less training and evaluation; of the first it counts from the start of the
process. `--profile` adds the functions that the trials spend most in, which makes them slower.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import pstats
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from provenance import write


def main() -> None:
    """Run the trials, and write each as it ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default="lora,lora,lora,qlora,qlora")
    parser.add_argument("--name", default="fixed_cost.json")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    measured: dict[str, Any] = {"trials": []}
    with tempfile.TemporaryDirectory() as folder:
        for result in trials(options.methods.split(","), Path(folder), profiled=options.profile):
            measured["trials"].append(result)
            print({key: value for key, value in result.items() if key != "profile"}, flush=True)
            print(result.get("profile", ""), flush=True)
            write(options.out / options.name, measured)


def trials(methods: list[str], folder: Path, *, profiled: bool) -> Any:
    """What each trial took."""
    start = time.time() - psutil.Process().create_time()
    begin = time.perf_counter()
    import torch

    from ray_peft.schedule import worker
    from ray_peft.schedule.decide import Demand
    from ray_peft.store.tracking import open_store

    store = open_store(f"sqlite:///{folder}/mlflow.db", "fixed cost", folder / "artifacts")
    gpu = torch.cuda.is_available()
    demand = Demand(num_workers=1, cpus_per_worker=4, gpus_per_worker=1.0 if gpu else 0.0)
    rows = write_rows(folder / "rows.jsonl")
    passed = start + time.perf_counter() - begin
    imports_s = passed
    for number, method in enumerate(methods):
        spec = spec_of(method, rows, number)
        begin = time.perf_counter()
        steps: list[float] = []
        profile = cProfile.Profile()
        if profiled:
            profile.enable()
        assignment = worker.Assignment(spec, folder / spec.trial_id, store, None, "fixed cost", demand)
        result = worker.run_here(assignment, lambda *_: steps.append(time.perf_counter()))  # noqa: B023
        profile.disable()
        assert result is not None
        wall, usage = time.perf_counter() - begin + passed, result.usage
        passed = 0.0
        text = io.StringIO()
        if profiled:
            pstats.Stats(profile, stream=text).sort_stats("cumulative").print_stats(70)
        yield {
            "method": method, "status": result.status, "error": (result.error or "")[:300], "wall_s": wall,
            "fixed_s": wall - usage.train_s - usage.evaluate_s, "load_s": usage.load_s, "train_s": usage.train_s,
            "evaluate_s": usage.evaluate_s, "save_s": usage.save_s, "imports_s": imports_s if number == 0 else None,
            "first_step_s": steps[0] - begin, "train_loss_final": result.train_loss_final,
            "eval_loss": result.scores.eval_loss, **({"profile": text.getvalue()[:14000]} if profiled else {}),
        }  # fmt: skip


def spec_of(method: str, rows: Path, number: int) -> Any:
    """A trial of three steps."""
    from ray_peft.spec import TrialSpec

    model = Path(os.environ["RAY_PEFT_MODEL"]).absolute()
    own = {"lr": 1e-4 * (number + 1)} if method != "none" else {}
    return TrialSpec.from_plain(
        {
            "task": "llm_sft",
            "model": {"name": str(model), "random_weights": not list(model.glob("*.safetensors"))},
            "data": {
                "sources": [{"recipe": "prompt_completion", "path": str(rows), "train": 24, "test": 8}],
                "max_length": 128, "contamination": {"action": "allow"},
            },
            "method": {"name": method, **own},
            "train": {"steps": 3, "batch_size": 8, "micro_batch_size": 8, "log_every": 1},
            "evaluation": {"generate": False},
        }
    )  # fmt: skip


def write_rows(path: Path) -> Path:
    """40 rows of some words."""
    draw = random.Random(0)
    words = ["what", "is", "the", "red", "river", "name", "of", "a", "city", "write", "about", "it", "now", "green"]
    with path.open("w", encoding="utf-8") as file:
        for number in range(40):
            prompt, completion = (" ".join(draw.choices(words, k=12)) for _ in range(2))
            file.write(json.dumps({"prompt": f"{number} {prompt}", "completion": completion}) + "\n")
    return path


if __name__ == "__main__":
    main()
