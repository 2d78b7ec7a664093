"""Seconds of every method on this machine: known from earlier trials, else measured with a few steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ray_peft.checks.inspector import Inspector
from ray_peft.checks.trials import inspect_trials
from ray_peft.compare.budget import BASE, Seconds
from ray_peft.compare.setup import Setup
from ray_peft.compare.space_text import written
from ray_peft.compare.speed_trials import OVERHEAD_S, RUNG, STEPS, NewSpeeds, RunSweep, run_trials, speed_space
from ray_peft.errors import SpecError
from ray_peft.foundation.audience import Audience, Silence
from ray_peft.schedule.plan import planned
from ray_peft.space.read import parse
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.tasks.base import Workload
from ray_peft.trial import speed
from ray_peft.trial.provenance import cpu_name
from ray_peft.trial.speed import Speed

LEAST_SWEEPS = 3
"""One that measures, one that searches and one that answers."""


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


def measure(
    setup: Setup, folder: Path, gpu_memory_gib: float | None, run: RunSweep, console: Audience, time_s: float
) -> Measured:
    """What every method takes; those that were never measured here are, in a sweep of a few steps.

    Args:
        setup: of the comparison.
        folder: of the comparison.
        gpu_memory_gib: what a trial may take of a GPU; None is all of it.
        run: runs a sweep.
        console: is told what is measured and left out.
        time_s: for the whole comparison.

    Raises:
        SpecError: no method fits or runs, or the time is gone before anything is measured.
        KeyboardInterrupt: the user stopped the sweep.
    """
    space = speed_space(setup)
    inspector = Inspector()
    checked = inspect_trials(parse(written(space, "", {}), RUNG).trials, Silence(), inspector).trials
    trials: dict[str, TrialSpec] = {trial.method.name: trial for trial in checked}
    too_large, memory_gib, settled = _fitting(setup, trials, gpu_memory_gib)
    load = TASKS["llm_sft"].workload(trials[BASE])
    assert load is not None
    device = _device(setup)
    keys = {name: speed.key(trial, inspector.content(trials[name]).model, device) for name, trial in settled.items()}
    speeds = _known(settled, keys, load, setup)
    missing = [name for name in settled if name not in speeds]
    new = NewSpeeds({}, {}, OVERHEAD_S)
    if missing:
        if time_s < LEAST_SWEEPS * OVERHEAD_S:
            raise SpecError(
                f"--hours {time_s / 3600:g}: a comparison is {LEAST_SWEEPS} sweeps or more, of which each takes about "
                f"{OVERHEAD_S:.0f} s to start and to end; give --hours {LEAST_SWEEPS * OVERHEAD_S / 3600:.2g} or more"
            )
        console.say(f"not measured yet on {device}: {', '.join(missing)}; they train for {STEPS[setup.on_gpu]} steps")
        new = run_trials(setup, space, missing, load, folder, run)
        for name, of_method in new.speeds.items():
            speed.remember(keys[name], of_method)
    speeds |= new.speeds
    left_out = {**too_large, **new.failures}
    for name, reason in left_out.items():
        console.say(f"{name} is left out: {reason}")
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
        overhead_s=new.overhead_s,
    )


def _known(trials: Mapping[str, TrialSpec], keys: Mapping[str, str], load: Workload, setup: Setup) -> dict[str, Speed]:
    """The kept speeds of shapes by method, of those that predict all that the comparison asks for."""
    speeds = {}
    for name, trial in trials.items():
        known = speed.read(keys[name])
        steps = 0 if name == BASE else 1
        enough = [speed.predicted(trial, known, load, steps, on_gpu=setup.on_gpu)]
        if not setup.answers or steps:
            loss_alone = replace(load, answered_rows=0)
            enough.append(speed.predicted(trial, known, loss_alone, steps, on_gpu=setup.on_gpu))
        if known is not None and all(enough):
            speeds[name] = known
    return speeds


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
