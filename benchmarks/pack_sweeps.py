"""Whole sweeps in which trials train together, against the same sweeps in which each trains by itself: makespan.

    RAY_PEFT_MODEL=gemma-3-1b-it RAY_PEFT_DOLLY=dolly.jsonl.gz python benchmarks/pack_sweeps.py --out results

RAY_PEFT_MODEL names a folder with config.json and tokenizer; weights are random, of the true shape. RAY_PEFT_SMALL
names one with weights, for the cases that answer prompts. A makespan is that of `ray_peft.sweep` on a Ray that is
there: checks, processes, loading, training, evaluation, saving, MLflow and report. `packed` has `train.pack: auto`,
`shared` lets trials share the GPU as processes, `apart` runs trials one after the other on the whole GPU: all of them,
or the first ones, whose seconds then stand for the others. `here` and `here_apart` are packed trials and single ones in
this process, without Ray and MLflow, after a trial that has loaded all libraries. Every run says where its seconds
went: by the rows, by the moments of its log, and by the function that the main thread was in.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import re
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

import ray_peft
from ray_peft.console import Console
from ray_peft.schedule import cluster
from ray_peft.schedule.worker import memory_limit
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
    apart: int | None = None
    """Trials that are measured one after the other; None is all."""
    full: bool = False
    """Every row is as long as the limit."""
    answers: int = 0
    """Held-out rows that each trial answers, of the model that has weights; 0 for the other model."""
    cap_gib: float | None = None
    """What trials may take of the GPU; None is all."""

    @property
    def name(self) -> str:
        rows = f"{self.rows} {'full ' if self.full else ''}rows of up to {self.length} tokens a step"
        more = f", {self.answers} answers" if self.answers else ""
        more += f", {self.cap_gib:g} GiB" if self.cap_gib is not None else ""
        return f"{self.trials} {self.method}, {rows}, {self.steps} steps{more}"


CASES = [
    Case("lora", 8, apart=2),
    Case("qlora", 16, apart=1),
    Case("lora", 8, rows=8, steps=20, full=True, apart=1),
    Case("lora", 1),
    Case("lora", 8, apart=1, cap_gib=12),
    Case("lora", 8, rows=4, answers=100, steps=200),
    Case("lora", 1, rows=4, answers=100),
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
    count = case.apart or case.trials if kind.endswith("apart") else case.trials
    grid = [
        {"name": case.method, "rank": (8, 16)[place % 2], "lr": round(1e-4 * (1 + place // 2), 6)}
        for place in range(case.trials)
    ]
    plain = {
        "name": re.sub(r"\W+", "_", f"{kind}_{case.name}"),
        "model": {"name": os.environ["RAY_PEFT_SMALL"]} if case.answers else {"name": model, "random_weights": True},
        "data": {
            "sources": [
                {"recipe": "text", "path": long_rows(folder, dolly), "train": 200, "test": 16}
                if case.full
                else {"recipe": "dolly", "path": dolly, "train": 1000, "test": max(16, case.answers)}
            ],
            "max_length": case.length,
            "contamination": {"action": "allow"},
        },
        "method": {"grid": grid[:count]},
        "train": {
            "steps": case.steps, "batch_size": case.rows, "micro_batch_size": case.rows, "schedule": "constant",
            "loss": "all", "pack": "auto" if kind == "packed" else False,
        },
        "evaluation": {"generate": True, "max_new_tokens": 128} if case.answers else {"generate": False},
        "resources": {"gpus_per_worker": 1} if kind == "apart" else {},
    }  # fmt: skip
    path = folder / f"{plain['name']}.yaml"
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return path


class Timed(Console):
    """A console that remembers what it said when."""

    def __init__(self) -> None:
        super().__init__()
        self._begin = time.perf_counter()
        self.said: list[tuple[float, str]] = []

    def say(self, text: str) -> None:
        """Say it, and remember."""
        self.said.append((round(time.perf_counter() - self._begin, 2), text[:120]))
        super().say(text)


@contextlib.contextmanager
def sampled(every_s: float = 0.1) -> Iterator[Counter[str]]:
    """Counts the main thread's seconds by the innermost function of ray_peft that it is in."""
    seconds: Counter[str] = Counter()
    ended, main = threading.Event(), threading.get_ident()

    def look() -> None:
        while not ended.wait(every_s):
            frame = sys._current_frames().get(main)
            while frame is not None and "/ray_peft/" not in frame.f_code.co_filename:
                frame = frame.f_back
            if frame is not None:
                file = frame.f_code.co_filename.rpartition("/ray_peft/")[2]
                seconds[f"{file}:{frame.f_lineno} {frame.f_code.co_qualname}"] += every_s

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield seconds
    finally:
        ended.set()
        watcher.join()


def largest(seconds: Counter[str]) -> dict[str, float]:
    """The functions with the most seconds."""
    return {name: round(value, 1) for name, value in seconds.most_common(30)}


def measured(case: Case, kind: str, folder: Path, model: str, dolly: str) -> dict[str, Any]:
    """One sweep."""
    space = write_space(case, folder, kind, model, dolly)
    console, moment, begin = Timed(), datetime.now(UTC), time.perf_counter()
    with sampled() as in_main:
        outcome = ray_peft.sweep(space, out=folder / space.stem, console=console, gpu_memory_gib=case.cap_gib)
    seconds = time.perf_counter() - begin
    rows = outcome.results
    starts = [datetime.fromisoformat(row.provenance.started_at) for row in rows]
    ends = [datetime.fromisoformat(row.provenance.ended_at or row.provenance.started_at) for row in rows]
    trials_s = (max(ends) - min(starts)).total_seconds()
    split = phases_s(rows)
    split["beside_s"] = trials_s - sum(split.values())  # processes, adapters, recordings, MLflow
    split["before_s"] = (min(starts) - moment).total_seconds()
    split["after_s"] = seconds - split["before_s"] - trials_s
    log = outcome.folder / "trials" / rows[0].trial_id / "log.txt"
    return {
        "seconds": seconds,
        "split": {name: round(value, 1) for name, value in split.items()},
        "said": console.said,
        "in_main": largest(in_main),
        "log": moments(log.read_text(encoding="utf-8")) if log.is_file() else [],
        **of_rows(rows),
    }


PHASES = ("load_s", "train_s", "evaluate_s", "save_s")


def phases_s(rows: list[Any]) -> dict[str, float]:
    """Seconds of each phase, of all trials."""
    return {phase: sum(getattr(row.usage, phase) for row in rows) for phase in PHASES}


def moments(log: str) -> list[str]:
    """The lines of a log that are no training steps, but for the first and the last of these."""
    lines = log.splitlines()
    steps = [line for line in lines if "train_loss" in line]
    left = {id(line) for line in steps[1:-1]}
    return [line[11:150] for line in lines if id(line) not in left]


def of_rows(rows: list[Any]) -> dict[str, Any]:
    """What their rows say."""
    return {
        "trials": len(rows),
        "status": sorted(row.status for row in rows),
        "pack_size": [row.pack_size for row in rows],
        "passes": sorted({row.passes for row in rows}),
        "gpus_per_worker": [row.provenance.gpus_per_worker for row in rows],
        "eval_loss": [row.scores.eval_loss for row in rows],
        "rouge_l": [row.scores.rouge_l for row in rows],
        "train_loss": [row.train_loss_final for row in rows],
        "steps": [row.steps for row in rows],
        "usage": [{key: getattr(row.usage, key) for key in ("wall_time_s", *PHASES)} for row in rows],
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
    """Trials in this process: loading, training, evaluation and saving."""
    space = write_space(case, folder, kind, model, dolly)
    specs = load(space).trials
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    members = [
        Member(spec, trial.Place(folder / space.stem / spec.trial_id, device), Untracked(), lambda metrics, step: None)
        for spec in specs
    ]
    with memory_limit(case.cap_gib, device), sampled() as in_main:
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
    split = phases_s(rows)
    split["beside_s"] = ends[-1] - sum(split.values())
    rounded = {name: round(value, 1) for name, value in split.items()}
    return {"seconds": ends[-1], "split": rounded, "ends": ends, "in_main": largest(in_main), **of_rows(rows)}


def ratios(case: Case, cells: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times as long the other ways take as packed trials."""
    by_way: dict[str, float] = {}
    packed = cells.get("packed", {}).get("seconds")
    if packed and "seconds" in cells.get("shared", {}):
        by_way["shared"] = cells["shared"]["seconds"] / packed
    if packed and "seconds" in cells.get("apart", {}):
        walls = [usage["wall_time_s"] for usage in cells["apart"]["usage"]]
        missing = case.trials - len(walls)
        whole = cells["apart"]["seconds"] + missing * min(walls)  # later ones have warm libraries
        by_way["apart_estimated_trials"] = missing
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
