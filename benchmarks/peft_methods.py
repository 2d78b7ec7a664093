"""PEFT's methods side by side on one GPU: loss, seconds, how passes ran, and the peak as predicted and as measured.

    python benchmarks/peft_methods.py OUT.json --model FOLDER --rows alpaca.jsonl.gz --steps 100 --seconds 200

The methods are those of search_spaces/peft_methods.yaml, then the same on a base in 4 bits, then some on one in 8 bits
and those that are not in the file; or those of --methods, at so many times their learning rates as --rates says. No
cell begins after --seconds; those left are listed. With --random the model has random weights of its config's shape:
then losses compare nothing but whether a method learns at all. With --predict the same command adds predictions to OUT,
without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from provenance import write
from speed import released

from ray_peft.methods import METHODS
from ray_peft.space import yaml_text
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks import TASKS
from ray_peft.trial.peaks import MemoryWatch
from ray_peft.vram.cards import ANY, known

SPACE = Path(__file__).parents[1] / "search_spaces" / "peft_methods.yaml"
FURTHER = [
    {"name": "olora"}, {"name": "hra"}, {"name": "randlora"}, {"name": "fourierft"},
    {"name": "ln_tuning"}, {"name": "prefix_tuning"}, {"name": "peft", "adapter": "lokr"},
]  # fmt: skip
IN_EIGHT_BITS = ("lora", "miss", "oft")


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.methods:
        known = {method.model_fields["name"].default: method for method in METHODS}
        named = [known[method["name"]].from_plain(method) for method in json.loads(options.methods)]
        rates = [float(rate) for rate in options.rates.split(",")]
        at_rates = [(method, method.plain()["lr"] * rate) for rate in rates for method in named]
        return [{"method": method.plain() | {"lr": lr}, "storage": None} for method, lr in at_rates]
    methods = yaml_text.parse(yaml_text.read(SPACE), str(SPACE))["method"]["grid"]
    chosen = [{"method": method, "storage": None} for method in methods]
    chosen += [{"method": method, "storage": "nf4"} for method in methods if method["name"] != "pissa"]
    chosen += [{"method": method, "storage": None} for method in FURTHER]
    chosen += [{"method": {"name": name}, "storage": "int8"} for name in IN_EIGHT_BITS]
    return [*chosen, {"method": {"name": "boft"}, "storage": None}]  # PEFT may compile a kernel for it


def spec_of(cell: dict[str, Any], options: argparse.Namespace) -> LlmTrialSpec:
    source = {"recipe": "alpaca", "path": options.rows, "train": options.train_rows, "test": options.test_rows}
    return LlmTrialSpec.from_plain(
        {
            "model": {"name": options.model, "random_weights": options.random, "quantization": cell["storage"]},
            "data": {"sources": [source], "max_length": options.max_length, "contamination": {"action": "drop"}},
            "method": cell["method"],
            "train": {
                "steps": options.steps, "batch_size": 16, "micro_batch_size": options.micro_batch_size,
                "log_every": 10, "checkpoint_every": None,
            },
            "evaluation": {"generate": False},
            "seed": 42,
        }
    )  # fmt: skip


def measured(spec: LlmTrialSpec, device: str) -> dict[str, Any]:
    """One trial without its answers: loaded, trained, scored, saved and loaded again."""
    task = TASKS["llm_sft"]
    bench, watch, work = task.load(spec, device), MemoryWatch(device), Path(tempfile.mkdtemp())
    ((stage, steps),) = spec.method.stages(bench.total_steps())
    before = bench.eval_loss()
    losses: list[float] = []
    watch.start()
    begin = time.perf_counter()
    try:
        bench.attach(stage)
        attach_s = time.perf_counter() - begin
        trained = bench.train(stage, steps, 0, work / "stage", lambda metrics, _: losses.append(metrics["train_loss"]))
    finally:
        watch.stop()
    after = bench.eval_loss()
    bench.save(work / "adapter", "float32")
    size = sum(file.stat().st_size for file in (work / "adapter").glob("*.safetensors"))
    again = task.load_trained(spec, work / "adapter", device).eval_loss()
    shutil.rmtree(work)
    return {
        "status": "measured",
        "trained_parameters": bench.parameters()[0],
        "adapter_bytes": size,
        "attach_s": round(attach_s, 2),
        "train_s": round(trained.seconds, 2),
        "passes": trained.passes,
        "train_losses": [round(loss, 4) for loss in losses],
        "eval_loss_before": round(before, 4),
        "eval_loss": round(after, 4),
        "eval_loss_loaded_again": round(again, 4),
        "peak_allocated_gib": watch.peaks.allocated_gib,
        "peak_reserved_gib": watch.peaks.reserved_gib,
    }


def predict(out: Path, options: argparse.Namespace) -> None:
    """Add what is predicted for every measured cell, on the card that it was measured on; needs no GPU."""
    result = json.loads(out.read_text(encoding="utf-8"))
    gpu = known(result["gpus"][0]) if result["gpus"] else ANY
    errors = []
    for cell in result["cells"]:
        if not cell.get("peak_allocated_gib"):
            continue
        cell["predicted"] = TASKS["llm_sft"].predict(spec_of(cell, options), gpu).gib()
        error = 100 * (cell["predicted"]["peak_allocated_gib"] / cell["peak_allocated_gib"] - 1)
        cell["error_percent"] = round(error, 2)
        errors.append(abs(error))
    if errors:
        result["accuracy"] = {
            "cells": len(errors),
            "median_error_percent": round(statistics.median(errors), 2),
            "largest_error_percent": round(max(errors), 2),
            "reserved_too_low": [
                [cell["method"], cell["storage"]]
                for cell in result["cells"]
                if "predicted" in cell and cell["predicted"]["peak_reserved_gib"] < cell["peak_reserved_gib"]
            ],
        }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result.get("accuracy"), indent=1))


def measure(options: argparse.Namespace) -> None:
    import torch

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    begin = time.perf_counter()
    results: list[dict[str, Any]] = []
    left: list[dict[str, Any]] = []
    settings = {key: str(value) for key, value in vars(options).items() if key not in ("model", "rows", "out")}
    for cell in cells(options):
        if time.perf_counter() - begin > options.seconds:
            left.append(cell)
            continue
        result = dict(cell)
        try:
            result |= measured(spec_of(cell, options), device)
        except Exception as error:  # one cell's failure is its result
            result |= {"status": "failed", "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        results.append(result)
        options.out.with_suffix(".partial.json").write_text(json.dumps(results), encoding="utf-8")  # if it is killed
        if device != "cpu":
            released()
    write(options.out, {"options": settings, "left": left, "cells": results})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--train-rows", type=int, default=480)
    parser.add_argument("--test-rows", type=int, default=48)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--methods", help="a JSON list of methods with their settings")
    parser.add_argument("--rates", default="1", help="factors on their learning rates, with commas")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--predict", action="store_true", help="add predictions to OUT, and measure nothing")
    options = parser.parse_args()
    os.environ.setdefault("RAY_PEFT_CACHE", tempfile.mkdtemp())
    if options.predict:
        predict(options.out, options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
