"""Every trial of both studies on 12 GiB: the profile `12gib` under a cap, on true shapes and the longest rows.

With RAY_PEFT_GEMMA2, RAY_PEFT_GEMMA3, RAY_PEFT_MODEL, RAY_PEFT_SD15, RAY_PEFT_CLIP, RAY_PEFT_DOLLY, RAY_PEFT_ALPACA,
RAY_PEFT_TULU, RAY_PEFT_ULTRACHAT and RAY_PEFT_VAN_GOGH set (those of the chosen spaces):
    python benchmarks/small_card.py FOLDER benchmarks/results/small_card_h200.json [SPACE ...]
    python benchmarks/small_card.py --table benchmarks/results/small_card_h200.json

The models are folders with config.json and tokenizer; their weights are random, so scores say nothing and are left out.
Each trial has the GPU to itself, so that speeds compare. Of each data set a few rows are taken, all of which are seen,
and beside them rows that fill `max_length`: a pass is as large as its longest row. Answers are of 32 tokens in place of
the study's, so evaluations take less than there. Spaces that the result file holds already, and that are not run, are
kept.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from long_rows import write_long_rows
from provenance import write
from studies import ANSWERS, ROOT, SHORT, STEPS

import ray_peft
from ray_peft.console import Console
from ray_peft.schedule import cluster
from ray_peft.space.read import Space, load

CARD_GIB = 12.0
PROFILE = "12gib"
LONG = 16
"""Training rows that fill `max_length`: some in each stage of a hybrid."""
ROWS: dict[str, list[dict[str, Any]]] = {
    "dolly": [{"recipe": "dolly", "path": "${RAY_PEFT_DOLLY}", "train": 64, "test": 16}],
    "alpaca": [{"recipe": "alpaca", "path": "${RAY_PEFT_ALPACA}", "train": 144, "validation": 8, "test": 24}],
    "three": [
        {"recipe": name, "path": f"${{RAY_PEFT_{name.upper()}}}", "train": 48, "validation": 4, "test": 8}
        for name in ("alpaca", "tulu", "ultrachat")
    ],
}
ALONE = "resources.gpus_per_worker=1"
"""Without it, small trials would share the 12 GiB."""
SMOLLM2 = ["model.name=${RAY_PEFT_MODEL}"]
SPACES: dict[str, tuple[str | None, list[str]]] = {
    "gemma2_dolly_lora_qlora": ("dolly", SHORT),
    "gemma3_qlora_galore": ("three", [*SHORT, *ANSWERS]),
    "gemma3_hybrid": ("three", [*SHORT, *ANSWERS]),
    "gemma3_ensemble": ("three", [*SHORT, *ANSWERS]),
    "sd15_van_gogh": (
        None,
        [
            "model.random_weights=true", "model.tokenizer=${RAY_PEFT_CLIP}", "train.steps=200", "train.log_every=20",
            "data.views=2", "evaluation.prompts=[a chicken]", "evaluation.seeds=[0, 1, 2, 3]",
            "evaluation.inference_steps=4",
        ],
    ),
    "quickstart": (
        None,
        [
            *SHORT, *ANSWERS, *SMOLLM2,
            "data.sources=[{recipe: alpaca, path: '${RAY_PEFT_ALPACA}', train: 60, test: 24}]",
        ],
    ),
    "smollm2_alpaca": ("alpaca", [*SHORT, *ANSWERS, *SMOLLM2, "seed=42"]),
}  # fmt: skip


def main(folder: Path, target: Path, chosen: list[str]) -> None:
    """Run the chosen spaces (all by default); the result is written after each, so that a late failure loses nothing.

    Raises:
        SystemExit: no such space.
    """
    unknown = sorted(set(chosen) - set(SPACES))
    if unknown:
        raise SystemExit(f"no such space: {', '.join(unknown)}; choose from {', '.join(SPACES)}")
    earlier = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    spaces: dict[str, Any] = earlier.get("spaces", {})
    with cluster.connect():  # one Ray for all sweeps
        for name in chosen or SPACES:
            spaces[name] = measured(name, folder)
            write(target, {"card_gib": CARD_GIB, "profile": PROFILE, "steps": STEPS, "spaces": spaces})
    print(table(spaces))


def measured(name: str, folder: Path) -> dict[str, Any]:
    """The trials of one space."""
    begin = time.perf_counter()
    try:
        # The Gemma-3 spaces share their rows, so with one folder a trial of several spaces runs once.
        outcome = ray_peft.sweep(
            space(name, folder), out=folder / name.partition("_")[0], gpu_memory_gib=CARD_GIB, console=Console()
        )
    except Exception as error:  # a benchmark reports what failed and goes on
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}", "trials": []}
    trials = [row(name, result) for result in outcome.results]
    return {"wall_s": round(time.perf_counter() - begin, 1), "trials": trials}


def space(name: str, folder: Path) -> Space:
    """A search space with its profile, few steps, and few rows with the longest among them."""
    rows, overrides = SPACES[name]
    overrides = [*overrides, ALONE]
    path = ROOT / "search_spaces" / f"{name}.yaml"
    if rows is not None:
        lengths = {trial.data.max_length for trial in load(path, overrides, PROFILE).trials}
        long = write_long_rows(folder / f"{name}_longest.jsonl", 4 * LONG, max(lengths))
        source = {"recipe": "prompt_completion", "name": "longest", "path": str(long), "train": LONG, "test": 2}
        overrides = [*overrides, f"data.sources={json.dumps([source, *ROWS[rows]])}"]
    return load(path, overrides, PROFILE)


def row(name: str, result: ray_peft.TrialResult) -> dict[str, Any]:
    """What it was predicted to take, what it took, and how fast it was."""
    spec, usage, predicted = result.spec, result.usage, result.predicted
    return {
        "space": name,
        "trial_id": result.trial_id,
        "method": spec.method.name,
        "weights": getattr(spec.method, "weights", None),
        "max_length": getattr(spec.data, "max_length", None),
        "batch_size": spec.train.batch_size,
        "chosen": result.chosen,
        "lowered": result.lowered,
        "status": result.status,
        "error": (result.error or "").partition("\n")[0] or None,
        "steps": result.steps,
        "predicted_peak_allocated_gib": predicted.get("peak_allocated_gib"),
        "predicted_peak_reserved_gib": predicted.get("peak_reserved_gib"),
        "predicted_evaluation_gib": predicted.get("evaluation_gib"),
        "peak_allocated_gib": usage.peak_allocated_gib,
        "peak_reserved_gib": usage.peak_reserved_gib,
        "evaluation_allocated_gib": usage.evaluation_allocated_gib,
        "device_used_gib": usage.device_used_gib,
        "tokens_per_s": usage.tokens_per_s,
        "images_per_s": usage.images_per_s,
        "steps_per_s": usage.steps_per_s,
        "load_s": usage.load_s,
        "train_s": usage.train_s,
        "evaluate_s": usage.evaluate_s,
    }


def table(spaces: dict[str, Any]) -> str:
    """The trials as a Markdown table."""
    lines = [
        "| trial | rows a pass | checkpointing | predicted [GiB] | measured [GiB] | reserved [GiB] | tokens/s |",
        "| :--- | ---: | :--- | ---: | ---: | ---: | ---: |",
    ]
    for name, found in spaces.items():
        lines += [f"| {name}: {found['error']} | | | | | | |"] if "error" in found else []
        lines += [_line(each) for each in found["trials"]]
    return "\n".join(lines)


def _line(each: dict[str, Any]) -> str:
    settings = {**each["chosen"], **each["lowered"]}
    label = [each["space"], each["method"], *(str(each[key]) for key in ("weights", "max_length") if each[key])]
    speed = each["tokens_per_s"] or each["images_per_s"]
    unit = " images/s" if each["images_per_s"] else ""
    cells = [
        " ".join(label) + ("" if each["status"] == "finished" else f": {each['status']}"),
        f"{settings.get('train.micro_batch_size', '')}" + (" (lowered)" if each["lowered"] else ""),
        {True: "yes", False: "no", None: ""}[settings.get("train.gradient_checkpointing")],
        *(_number(each[key], 2) for key in ("predicted_peak_allocated_gib", "peak_allocated_gib", "peak_reserved_gib")),
        _number(speed, 1 if unit else 0) + (unit if speed else ""),
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


if __name__ == "__main__":
    if sys.argv[1] == "--table":
        print(table(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))["spaces"]))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
