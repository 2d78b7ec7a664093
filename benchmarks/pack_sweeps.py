"""Whole sweeps in which trials train together, against the same sweeps in which each trains by itself: makespan.

    RAY_PEFT_MODEL=gemma-3-1b-it RAY_PEFT_DOLLY=dolly.jsonl.gz python benchmarks/pack_sweeps.py --out results

RAY_PEFT_MODEL names a folder with config.json and tokenizer; weights are random, of the true shape. A makespan is that
of `ray_peft.sweep` on a Ray that is there: checks, processes, loading, training, the held-out loss, saving, MLflow and
report. `packed` has `train.pack: auto`, `shared` lets trials share the GPU as processes, `apart` runs some of them one
after the other on the whole GPU, and counts the mean of their seconds for each. `here` and `here_apart` are packed
trials and single ones in this process, without Ray and MLflow, after a trial that has loaded all libraries.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import time
import traceback
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

import ray_peft
from ray_peft.console import Console
from ray_peft.schedule import cluster
from ray_peft.space.read import load
from ray_peft.trial import provenance, trial
from ray_peft.trial.pack import Member, run_pack


@dataclass(frozen=True)
class Case:
    """A sweep over learning rates and two ranks."""

    method: str
    trials: int
    rows: int = 1
    """Rows of a step."""
    length: int = 512
    steps: int = 300
    apart: int = 2
    """Trials that are measured one after the other."""
    full: bool = False
    """Every row is as long as the limit."""

    @property
    def name(self) -> str:
        rows = f"{self.rows} {'full ' if self.full else ''}rows of up to {self.length} tokens a step"
        return f"{self.trials} {self.method}, {rows}, {self.steps} steps"


CASES = [
    Case("lora", 8, apart=1),
    Case("qlora", 16, apart=1),
    Case("lora", 8, rows=8, steps=20, full=True),
    Case("lora", 1, apart=1),
]


def long_rows(folder: Path, dolly: str) -> str:
    """A file of texts that are longer than any limit here."""
    path = folder / "long.jsonl"
    with gzip.open(dolly, "rt", encoding="utf-8") as file:
        texts = [" ".join(str(value) for value in json.loads(line).values()) for line in file]
    joined = [" ".join(texts[first : first + 40]) for first in range(0, 40 * 230, 40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in joined), encoding="utf-8")
    return str(path)


def write_space(case: Case, folder: Path, kind: str, model: str, dolly: str) -> Path:
    """The search space of one kind of run."""
    count = case.apart if kind.endswith("apart") else case.trials
    grid = [
        {"name": case.method, "rank": (8, 16)[place % 2], "lr": round(1e-4 * (1 + place // 2), 6)}
        for place in range(case.trials)
    ]
    plain = {
        "name": f"{kind}_{case.method}_{case.trials}_{case.rows}",
        "model": {"name": model, "random_weights": True},
        "data": {
            "sources": [
                {"recipe": "text", "path": long_rows(folder, dolly), "train": 200, "test": 16}
                if case.full
                else {"recipe": "dolly", "path": dolly, "train": 1000, "test": 16}
            ],
            "max_length": case.length,
            "contamination": {"action": "allow"},
        },
        "method": {"grid": grid[:count]},
        "train": {
            "steps": case.steps, "batch_size": case.rows, "micro_batch_size": case.rows, "schedule": "constant",
            "loss": "all", "pack": "auto" if kind == "packed" else False,
        },
        "evaluation": {"generate": False},
        "resources": {"gpus_per_worker": 1} if kind == "apart" else {},
    }  # fmt: skip
    path = folder / f"{plain['name']}.yaml"
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return path


def measured(case: Case, kind: str, folder: Path, model: str, dolly: str) -> dict[str, Any]:
    """One sweep."""
    space = write_space(case, folder, kind, model, dolly)
    begin = time.perf_counter()
    outcome = ray_peft.sweep(space, out=folder / space.stem, console=Console())
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, **of_rows(outcome.results)}


def of_rows(rows: list[Any]) -> dict[str, Any]:
    """What their rows say."""
    return {
        "trials": len(rows),
        "status": sorted(row.status for row in rows),
        "pack_size": [row.pack_size for row in rows],
        "passes": sorted({row.passes for row in rows}),
        "gpus_per_worker": [row.provenance.gpus_per_worker for row in rows],
        "eval_loss": [row.scores.eval_loss for row in rows],
        "train_loss": [row.train_loss_final for row in rows],
        "steps": [row.steps for row in rows],
        "usage": [
            {key: getattr(row.usage, key) for key in ("wall_time_s", "load_s", "train_s", "evaluate_s", "save_s")}
            for row in rows
        ],
        "peak_allocated_gib": max(row.usage.peak_allocated_gib or 0 for row in rows),
        "peak_reserved_gib": max(row.usage.peak_reserved_gib or 0 for row in rows),
        "errors": [(row.error or "")[-1500:] for row in rows if row.error],
    }


class Untracked:
    """A tracker that keeps nothing."""

    def start(self, spec: Any) -> None:
        """Nothing is opened."""

    def log(self, metrics: Any, step: int) -> None:
        """Nothing is kept."""

    def artifact(self, path: Path, folder: str, *, remove: bool = False) -> None:
        """Nothing is kept."""

    def table(self, rows: Any, artifact_file: str) -> None:
        """Nothing is kept."""

    def fetch(self, run_id: str, folder: str, to: Path) -> Path:
        """Nothing is there."""
        raise LookupError(run_id)

    def record(self, result: Any) -> Any:
        """The row as it is."""
        return result


def here(case: Case, kind: str, folder: Path, model: str, dolly: str) -> dict[str, Any]:
    """Trials in this process: loading, training, the held-out loss and saving."""
    specs = load(write_space(case, folder, kind, model, dolly)).trials
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    members = [
        Member(spec, trial.Place(folder / kind / spec.trial_id, device), Untracked(), lambda metrics, step: None)
        for spec in specs
    ]
    begin, ends = time.perf_counter(), []
    if kind == "here":
        rows = run_pack(members, lambda row: ends.append(time.perf_counter() - begin))
    else:
        rows = []
        for member in members:
            row = trial.run(member.spec, member.place, member.tracker, member.progress)
            assert row is not None
            rows.append(row)
            ends.append(time.perf_counter() - begin)
    return {"seconds": ends[-1], "ends": ends, **of_rows(rows)}


def ratios(case: Case, cells: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times as long the other ways take as packed trials."""
    by_way: dict[str, float] = {}
    packed = cells.get("packed", {}).get("seconds")
    if packed and "seconds" in cells.get("shared", {}):
        by_way["shared"] = cells["shared"]["seconds"] / packed
    if packed and "seconds" in cells.get("apart", {}):
        walls = [usage["wall_time_s"] for usage in cells["apart"]["usage"]]
        whole = cells["apart"]["seconds"] + (case.trials - len(walls)) * min(walls)  # later ones have warm libraries
        by_way |= {"apart": whole / packed, "apart_makespan_s": whole}
    if "seconds" in cells.get("here", {}) and "seconds" in cells.get("here_apart", {}):
        pack, single = cells["here"], cells["here_apart"]
        by_way["here"] = single["seconds"] / single["trials"] * case.trials / pack["seconds"]
        seconds = [sum(usage["train_s"] for usage in cell["usage"]) / cell["trials"] for cell in (single, pack)]
        by_way["here_training"] = seconds[0] / seconds[1]
    return by_way


def main() -> None:
    """Measure, and write what is measured as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/pack_sweeps"))
    parser.add_argument("--runs", default="0:packed,0:shared,0:apart", help="case:kind:steps, in order")
    parser.add_argument("--within", type=float, default=1e9, help="seconds after which no further sweep begins")
    options = parser.parse_args()
    begin = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("RAY_PEFT_OUTPUTS", str(options.work))
    results: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "cases": {}}
    results["versions"] = provenance.versions()
    runs = [run.split(":") for run in options.runs.split(",")]
    with contextlib.ExitStack() as ray:
        if any(not kind.startswith("here") for _, kind, *_ in runs):
            results["nodes"] = [str(node) for node in ray.enter_context(cluster.connect())]
        for number, kind, *steps in runs:
            case = CASES[int(number)]
            if steps:
                case = replace(case, steps=int(steps[0]))
            cells = results["cases"].setdefault(case.name, {})
            if time.perf_counter() - begin > options.within:
                cells[kind] = {"left_out": "no time was left"}
                continue
            run = here if kind.startswith("here") else measured
            try:
                cells[kind] = run(case, kind, options.work, os.environ["RAY_PEFT_MODEL"], os.environ["RAY_PEFT_DOLLY"])
            except Exception as error:  # a sweep that fails is a row
                cells[kind] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2500:]}
            cells["ratios"] = ratios(case, {key: cell for key, cell in cells.items() if key != "ratios"})
            print(f"{time.perf_counter() - begin:.0f} s", case.name, kind, json.dumps(cells["ratios"]), flush=True)
            (options.out / "pack_sweeps.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
