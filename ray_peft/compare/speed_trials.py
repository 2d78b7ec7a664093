"""The trials that measure: a few steps of every method whose seconds are not known on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_peft.compare.budget import BASE
from ray_peft.compare.setup import Setup
from ray_peft.compare.space_text import written
from ray_peft.foundation.whole import write_text
from ray_peft.report.table import error_line
from ray_peft.schedule.sweep import SweepOutcome
from ray_peft.tasks.base import Workload
from ray_peft.trial import speed
from ray_peft.trial.result import TrialResult
from ray_peft.trial.speed import Speed

RUNG = "0_speed"

OVERHEAD_S = 20.0
"""What a sweep takes beside its trials, where none was measured: Ray's start, a worker's imports, the report."""

STEPS = {True: 12, False: 4}
"""Steps of a trial that measures, on a GPU and on a CPU. A GPU records its passes in the first ones."""

ROWS = {True: 16, False: 8}
"""Rows that it scores."""

RunSweep = Callable[[Path, Path], SweepOutcome]
"""Runs the search space of a file into a folder."""


@dataclass(frozen=True)
class NewSpeeds:
    """What the trials that measure have said."""

    speeds: Mapping[str, Speed]
    """By method."""
    failures: Mapping[str, str]
    """Why a method's trial gave none, by its name."""
    overhead_s: float
    """What the sweep took beside its trials."""


def speed_space(setup: Setup) -> dict[str, Any]:
    """The search space of the trials that measure, of all methods and the untouched base."""
    rows = ROWS[setup.on_gpu]
    return setup.space(
        rung="speed",
        question="How long does a step of each method take here? Scores say nothing.",
        methods=[{"name": BASE}, *(method.at(1.0) for method in setup.methods)],
        steps=STEPS[setup.on_gpu],
        rows=(min(setup.most_train, 64), min(setup.most_validation, rows), min(setup.most_test, rows)),
        evaluation={"split": "validation", "generate": setup.answers},
        seed=1,
        log_every=1,
        eval_every=STEPS[setup.on_gpu] // 2,
    )


def run_trials(
    setup: Setup, space: dict[str, Any], names: Collection[str], load: Workload, folder: Path, run: RunSweep
) -> NewSpeeds:
    """Train the named methods for a few steps.

    Args:
        setup: of the comparison.
        space: what `speed_space` gave.
        names: methods that are measured.
        load: the rows of each trial.
        folder: of the comparison.
        run: runs a sweep.

    Raises:
        KeyboardInterrupt: the user stopped the sweep.
    """
    entries = [entry for entry in space["method"]["grid"] if entry["name"] in names]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{RUNG}.yaml"
    head = "Seconds of a step: a few steps of each method, whose scores say nothing."
    write_text(file, written({**space, "method": {"grid": entries}}, head, {}))
    begin = time.monotonic()
    outcome = run(file, folder / RUNG)
    if outcome.interrupted:
        raise KeyboardInterrupt
    seconds = time.monotonic() - begin
    rows: dict[str, TrialResult] = {row.spec.method.name: row for row in outcome.results}
    overhead_s = max(1.0, seconds - sum(row.usage.wall_time_s for row in rows.values()) / setup.gpus)
    speeds: dict[str, Speed] = {}
    failures: dict[str, str] = {}
    for name, row in rows.items():
        points = speed.points_of(outcome.folder / "trials" / row.trial_id / "metrics.jsonl")
        measured = speed.measured(row, points, load)
        if measured is None:
            failures[name] = f"its trial of a few steps ended: {error_line(row) if row.error else row.status}"
        else:
            speeds[name] = measured
    speeds, imports_s = without_imports(speeds, rows)
    return NewSpeeds(speeds, failures, overhead_s + imports_s)


def without_imports(speeds: Mapping[str, Speed], rows: Mapping[str, TrialResult]) -> tuple[dict[str, Speed], float]:
    """Take the libraries' imports out of the first trial's time, by that of the others; returns their seconds, too."""
    if len(speeds) < 2:
        return dict(speeds), 0.0
    first = min(speeds, key=lambda name: rows[name].provenance.started_at)
    usual = max(known.rest_s for name, known in speeds.items() if name != first)
    imports_s = max(0.0, speeds[first].rest_s - usual)
    lighter = speeds[first].model_copy(update={"rest_s": speeds[first].rest_s - imports_s})
    return {**speeds, first: lighter}, imports_s
