"""Seconds of every method on this machine: known from earlier trials, else measured with a few steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray_peft.checks.inspector import Inspector
from ray_peft.checks.trials import inspect_trials
from ray_peft.compare.budget import BASE, Seconds
from ray_peft.compare.setup import Setup
from ray_peft.compare.space_text import written
from ray_peft.errors import SpecError
from ray_peft.foundation.audience import Audience, Silence
from ray_peft.foundation.whole import write_text
from ray_peft.report.table import error_line
from ray_peft.schedule.plan import planned
from ray_peft.schedule.sweep import SweepOutcome
from ray_peft.space.read import parse
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.tasks.base import Workload
from ray_peft.trial import speed
from ray_peft.trial.provenance import cpu_name
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
class Measured:
    """The methods that can run here, and what they take."""

    setup: Setup
    """With these methods alone."""
    left_out: Mapping[str, str]
    """Why a method cannot run, by its name."""
    memory_gib: Mapping[str, float]
    """Predicted peak by method; empty on a CPU."""
    speeds: Mapping[str, Speed]
    trials: Mapping[str, TrialSpec]
    """By method, a trial whose lengths and settings are those of all."""
    row_tokens: float
    overhead_s: float

    def seconds(self) -> Seconds:
        """Of a trial, by method, steps and rows."""

        def of(method: str, steps: int, scored: int, answered: int) -> float:
            trial, known = self.trials[method], self.speeds[method]
            load = Workload(self.row_tokens, scored, answered)
            single_step = speed.predicted(trial, known, load, 0 if method == BASE else 1, on_gpu=self.setup.on_gpu)
            return single_step["wall_time_s"] + (steps - 1) * single_step.get("step_s", 0.0)

        return of


def measure(setup: Setup, folder: Path, gpu_memory_gib: float | None, run: RunSweep, console: Audience) -> Measured:
    """What every method takes; those that were never measured here are, in a sweep of a few steps.

    Raises:
        SpecError: no method fits or runs.
        KeyboardInterrupt: the user stopped the sweep.
    """
    space = _space(setup)
    parsed = parse(written(space, "", {}), RUNG)
    inspector = Inspector()
    checked = inspect_trials(parsed.trials, Silence(), inspector).trials
    trials: dict[str, TrialSpec] = {trial.method.name: trial for trial in checked}
    left_out, memory_gib, settled = _fitting(setup, trials, gpu_memory_gib)
    for name, reason in left_out.items():
        console.say(f"{name} is left out: {reason}")
    device = _device(setup)
    keys = {name: speed.key(trial, inspector.content(trials[name]).model, device) for name, trial in settled.items()}
    load = TASKS["llm_sft"].workload(trials[BASE])
    assert load is not None
    remembered = {name: _known(settled[name], key, load, setup) for name, key in keys.items()}
    speeds = {name: known for name, known in remembered.items() if known is not None}
    missing = [name for name in settled if name not in speeds]
    overhead_s = OVERHEAD_S
    if missing:
        console.say(f"not measured yet on {device}: {', '.join(missing)}; they train for {STEPS[setup.on_gpu]} steps")
        begin = time.monotonic()
        outcome = _measure(setup, space, missing, folder, run)
        seconds = time.monotonic() - begin
        rows: dict[str, TrialResult] = {row.spec.method.name: row for row in outcome.results}
        overhead_s = max(1.0, seconds - sum(row.usage.wall_time_s for row in rows.values()) / setup.gpus)
        new: dict[str, Speed] = {}
        for name in missing:
            row = rows[name]
            points = speed.points_of(outcome.folder / "trials" / row.trial_id / "metrics.jsonl")
            of_trial = speed.measured(row, points, load)
            if of_trial is None:
                left_out[name] = f"its trial of a few steps ended: {error_line(row) if row.error else row.status}"
                console.say(f"{name} is left out: {left_out[name]}")
            else:
                new[name] = of_trial
        overhead_s += _without_imports(new, rows)
        for name, of_trial in new.items():
            speed.remember(keys[name], of_trial)
        speeds |= new
    running = tuple(method for method in setup.methods if method.name in speeds)
    if not running or BASE not in speeds:
        raise SpecError(f"no method can be compared here: {'; '.join(f'{n}: {why}' for n, why in left_out.items())}")
    return Measured(
        setup=replace(setup, methods=running),
        left_out=left_out,
        memory_gib=memory_gib,
        speeds=speeds,
        trials=settled,
        row_tokens=load.row_tokens,
        overhead_s=overhead_s,
    )


def _without_imports(speeds: dict[str, Speed], rows: Mapping[str, TrialResult]) -> float:
    """Take the imports of the libraries out of the first trial's time, by that of the others; returns their seconds."""
    if len(speeds) < 2:
        return 0.0
    first = min(speeds, key=lambda name: rows[name].provenance.started_at)
    usual = max(known.rest_s for name, known in speeds.items() if name != first)
    imports_s = max(0.0, speeds[first].rest_s - usual)
    speeds[first] = speeds[first].model_copy(update={"rest_s": speeds[first].rest_s - imports_s})
    return imports_s


def _space(setup: Setup) -> dict[str, Any]:
    rows = ROWS[setup.on_gpu]
    entries = [{"name": BASE}, *(method.at(1.0) for method in setup.methods)]
    evaluation = {"split": "validation", "generate": setup.answers}
    return setup.space(
        rung="speed",
        question="How long does a step of each method take here? Scores say nothing.",
        methods=entries,
        steps=STEPS[setup.on_gpu],
        rows=(min(setup.most_train, 64), min(setup.most_validation, rows), min(setup.most_test, rows)),
        evaluation=evaluation,
        seed=1,
        log_every=1,
        eval_every=STEPS[setup.on_gpu] // 2,
    )


def _measure(setup: Setup, space: dict[str, Any], names: Sequence[str], folder: Path, run: RunSweep) -> SweepOutcome:
    entries = [entry for entry in space["method"]["grid"] if entry["name"] in names]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{RUNG}.yaml"
    write_text(file, written({**space, "method": {"grid": entries}}, _HEAD, {}))
    outcome = run(file, folder / RUNG)
    if outcome.interrupted:
        raise KeyboardInterrupt
    return outcome


_HEAD = "Seconds of a step: a few steps of each method, whose scores say nothing."


def _known(trial: TrialSpec, key: str, load: Workload, setup: Setup) -> Speed | None:
    """The kept speed of a trial's shape, if it predicts all that the comparison asks for."""
    known = speed.read(key)
    steps = 0 if trial.method.name == BASE else 1
    enough = [speed.predicted(trial, known, load, steps, on_gpu=setup.on_gpu)]
    if not setup.answers or steps:
        loss_alone = replace(load, answered_rows=0)
        enough.append(speed.predicted(trial, known, loss_alone, steps, on_gpu=setup.on_gpu))
    return known if all(enough) else None


def _fitting(
    setup: Setup, trials: Mapping[str, TrialSpec], gpu_memory_gib: float | None
) -> tuple[dict[str, str], dict[str, float], dict[str, TrialSpec]]:
    """Why methods do not fit, the predicted peaks [GiB] of those that do, and their trials with what was chosen."""
    sizes = [node.gpu_memory_gib for node in setup.nodes if node.gpus and node.gpu_memory_gib is not None]
    if not setup.on_gpu or not (sizes or gpu_memory_gib):
        return {}, {}, dict(trials)
    memory = min([*sizes, *([gpu_memory_gib] if gpu_memory_gib else [])])
    name = next((node.gpu_name for node in setup.nodes if node.gpus), None)
    decision = planned(list(trials.values()), memory, gpus=setup.gpus, gpu_name=name)
    left_out: dict[str, str] = {}
    peaks: dict[str, float] = {}
    settled: dict[str, TrialSpec] = {}
    for run in decision.runs:
        method, prediction = run.trial.method.name, run.size.prediction
        peak = prediction.gib()["peak_reserved_gib"] if prediction is not None else None
        if run.fits is False and method != BASE:
            left_out[method] = f"it is predicted to take {peak:.1f} GiB, more than {memory:g} GiB hold"
            continue
        if peak is not None:
            peaks[method] = peak
        settled[method] = run.trial.changed(run.demand.chosen) if run.demand.chosen else run.trial
    return left_out, peaks, {name: settled[name] for name in trials if name in settled}


def _device(setup: Setup) -> str:
    """What trials here call their device."""
    if setup.on_gpu:
        return next(node.gpu_name or "a GPU" for node in setup.nodes if node.gpus)
    return cpu_name(min(node.cpus for node in setup.nodes))
