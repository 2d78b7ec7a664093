"""Seconds that planned trials are predicted to take, each by itself, and their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_peft.checks.inspector import Inspector
from ray_peft.report.digits import duration
from ray_peft.schedule.decide import Decision, Demand
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.trial import speed
from ray_peft.trial.provenance import cpu_name

NOT_MEASURED = "time not measured yet"


def predicted_seconds(decision: Decision, gpu_name: str | None) -> dict[str, dict[str, float]]:
    """By trial id what `speed.predicted` says of every trial by itself; empty where its shape was not measured.

    Args:
        decision: where they run.
        gpu_name: of the GPUs, as the driver writes it; None where it is not known.

    Raises:
        DataError, ModelError: the user's to mend.
    """
    inspector = Inspector()
    return {
        trial.trial_id: _of_trial(trial, run.demand_of(trial), inspector, gpu_name)
        for run in decision.runs
        for trial in run.trials
    }


def _of_trial(trial: TrialSpec, demand: Demand, inspector: Inspector, gpu_name: str | None) -> dict[str, float]:
    device = gpu_name if demand.gpus_per_worker else cpu_name(demand.cpus_per_worker)
    if device is None or trial.members():
        return {}
    placed = trial.changed(demand.chosen) if demand.chosen else trial
    task = TASKS[trial.task]
    known = speed.read(speed.key(placed, inspector.content(trial).model, device))
    if known is None:
        return {}
    steps = task.total_steps(trial, inspector.inspect(trial).train_rows)
    steps = steps if trial.method.stages(steps) else 0
    return speed.predicted(placed, known, task.workload(trial), steps, on_gpu=demand.gpus_per_worker > 0)


def seconds_text(seconds: Mapping[str, float]) -> str:
    """A trial's time, such as `12.4 min (0.352 s a step)`."""
    if not seconds:
        return NOT_MEASURED
    step = f" ({seconds['step_s']:.3g} s a step)" if "step_s" in seconds else ""
    return f"{duration(seconds['wall_time_s'])}{step}"


def sum_line(trials: Sequence[TrialSpec], seconds: Mapping[str, Mapping[str, float]]) -> str:
    """The time of all trials."""
    known = [of_trial["wall_time_s"] for trial in trials if (of_trial := seconds.get(trial.trial_id))]
    if not known:
        return "time: no trial of these shapes was measured here yet; `ray-peft compare` measures, and so does a sweep"
    missing = len(trials) - len(known)
    more = f", and {missing} that were not measured yet" if missing else ""
    return f"time: {duration(sum(known))} for {len(known)} trials one after the other{more}"
