"""What a sweep would do, without doing it: its trials, checked, and what runs where on a machine that is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray_peft.checks.trials import inspect_trials
from ray_peft.errors import SearchSpaceError
from ray_peft.foundation.audience import Audience, Silence
from ray_peft.foundation.units import GIB
from ray_peft.schedule.cluster import cores_here
from ray_peft.schedule.decide import Decision, Demand, Node, Run, card, decide
from ray_peft.schedule.packs import packs, proposed_at_a_time
from ray_peft.schedule.seconds import seconds_text, sum_line
from ray_peft.schedule.sizes import forecast, predicted
from ray_peft.space.read import load
from ray_peft.spec import TrialSpec
from ray_peft.vram import settings_text


def plan(
    space: str | Path,
    overrides: list[str] | None = None,
    profile: str | None = None,
    console: Audience | None = None,
) -> list[TrialSpec]:
    """The trials of a search space, checked, without loading weights or starting Ray; notes go to `console`.

    Raises:
        RayPeftError: a wrong search space, or missing or malformed data or model.
    """
    loaded = load(space, overrides, profile)
    if not loaded.trials:
        raise SearchSpaceError(f"{space}: has no trials")
    console = console or Silence()
    proposed = loaded.search is not None and loaded.search.algorithm == "optuna"
    if loaded.search is not None and proposed:
        console.say(
            f"search: Optuna proposes {loaded.search.samples} trials one by one, or pack by pack, from what earlier "
            "ones gave; the trials below are random draws, which show their kind"
        )
    if loaded.search is not None and loaded.search.scheduler is not None:
        console.say(f"search: {loaded.search.scheduler} ends trials early; what is predicted is for whole trials")
    for note in loaded.notes:
        console.say(note)
    trials = inspect_trials(loaded.trials, console).trials
    return proposed_at_a_time(trials) if proposed else trials


def planned(
    trials: Sequence[TrialSpec],
    gpu_memory_gib: float,
    *,
    gpus: int = 1,
    gpu_name: str | None = None,
    cpus: int | None = None,
) -> Decision:
    """What a sweep would decide on a machine with these GPUs; trials on its CPU are predicted, too.

    Args:
        trials: checked.
        gpu_memory_gib: of each GPU, as much of it as trials may take.
        gpus: how many there are.
        gpu_name: as the driver writes it, for the GPU's own overheads.
        cpus: cores; None is those of this machine, or what a trial asks for if that is more.

    Raises:
        DataError, ModelError: the user's to mend.
    """
    cores = [trial.resources.num_workers * (trial.resources.cpus_per_worker or 1) for trial in trials]
    machine = Node(cpus or max(cores_here(), *cores), gpus, gpu_name, gpu_memory_gib)
    target = card([machine])
    assert target is not None
    sizes = {trial.trial_id: predicted(trial, target) for trial in trials}
    formed = packs(trials, [machine], target, sizes, partial(forecast, target))
    return decide(trials, [machine], sizes, packs=formed)


def plain(
    trial: TrialSpec, decision: Decision | None, seconds: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, Any]:
    """A trial of a plan as JSON: what is predicted, and where it runs if that was decided.

    Args:
        trial: of the plan.
        decision: None if nothing was decided.
        seconds: what trials are predicted to take, by id; None if that was not asked for.
    """
    row: dict[str, Any] = {"trial_id": trial.trial_id, "predicted_peak_gib": None}
    runs = decision.runs if decision is not None else []
    for order, run in enumerate(runs, start=1):
        if trial.trial_id in [member.trial_id for member in run.trials]:
            row |= _predicted(run) | _placed(run, order, trial)
            break
    else:
        if decision is not None:
            row |= {"fits": False, "problem": decision.impossible[trial.trial_id]}
    row |= {} if seconds is None else {"predicted_s": dict(seconds.get(trial.trial_id, {}))}
    return row | {"spec": trial.plain()}


def _predicted(run: Run) -> dict[str, Any]:
    prediction = run.size.prediction
    if prediction is None:
        return {}
    return {
        "predicted_peak_gib": _gib(prediction.peak_allocated),
        "predicted_reserved_gib": _gib(prediction.peak_reserved),
        "predicted_evaluation_gib": None if prediction.evaluation is None else _gib(prediction.evaluation),
        "components": {kind: _gib(size) for kind, size in prediction.components.items()},
    }


def _placed(run: Run, order: int, trial: TrialSpec) -> dict[str, Any]:
    together = [member.trial_id for member in run.trials] if run.is_pack else []
    return {
        "pack": together,
        "pack_gain": None if run.gain is None else round(run.gain, 2),
        "fits": run.fits,
        "gpu_fraction": run.demand.gpus_per_worker,
        "cpus_per_worker": run.demand.cpus_per_worker,
        "num_workers": run.demand.num_workers,
        "order": order,
        "chosen": dict(run.demand_of(trial).chosen),
        "suggestions": [
            {
                "changes": way.changes,
                "predicted_peak_gib": _gib(way.predicted.peak_allocated),
                "fits": way.fits,
                "same_training": way.same_training,
            }
            for way in run.size.less
        ],
    }


def _gib(size: int) -> float:
    return round(size / GIB, 4)


def lines(
    trials: Sequence[TrialSpec],
    labels: dict[str, str],
    decision: Decision | None,
    seconds: Mapping[str, Mapping[str, float]] | None = None,
) -> list[str]:
    """For people: a line a trial, what to change where it does not fit, how many run at once, and how long they take.

    Args:
        trials: of the plan.
        labels: what to call them, by id.
        decision: None if nothing was decided.
        seconds: what trials are predicted to take, by id; None says nothing of it.
    """
    heads = {trial.trial_id: f"{trial.trial_id}  {labels[trial.trial_id]}" for trial in trials}
    if decision is None:
        return list(heads.values())
    text = []
    singles = {run.trial.trial_id: run for run in decision.runs if not run.is_pack}
    packs = [run for run in decision.runs if run.is_pack]
    packed = {trial.trial_id for run in packs for trial in run.trials}
    for trial_id, head in heads.items():
        if trial_id in singles:
            text += _run_lines(head, singles[trial_id], None if seconds is None else seconds.get(trial_id, {}))
        elif trial_id not in packed:
            text.append(f"{head}, DOES NOT FIT: {decision.impossible[trial_id]}")
    for run in packs:
        text += [_run_lines(pack_text(run), run)[0], *(f"    {heads[trial.trial_id]}" for trial in run.trials)]
    times = [] if seconds is None else [sum_line(trials, seconds)]
    return [*text, *times, _summary(len(trials), decision)]


def pack_text(run: Run) -> str:
    """How many trials train together, and what that is predicted to save."""
    saved = f", their steps {run.gain:.1f} times as fast as one after the other" if run.gain is not None else ""
    return f"{len(run.trials)} trials together on one base{saved}"


def _run_lines(head: str, run: Run, seconds: Mapping[str, float] | None = None) -> list[str]:
    prediction, chosen, less = run.size.prediction, run.demand.chosen, run.size.less
    line = head
    where = " on each worker" if run.trials[0].sharded else ""
    line += f"  peak {prediction.peak_allocated / GIB:.2f} GiB{where}" if prediction is not None else ""
    line += ", DOES NOT FIT" if run.fits is False else ""
    line += f", {demand_text(run.demand)}"
    line += f", with {settings_text(chosen)}" if chosen else ""
    line += f", {seconds_text(seconds)}" if seconds is not None else ""
    return [line + ("; what takes less:" if less else ""), *(f"    {way.line()}" for way in less)]


def cautions(decision: Decision) -> list[str]:
    """What a user must know of a decision before its runs start: what is not predicted, does not fit, or fits some."""
    text = []
    for run in decision.runs:
        trial_id, size = ", ".join(trial.trial_id for trial in run.trials), run.size
        if size.problem:
            text.append(f"no memory prediction of {trial_id}: {size.problem}")
        placed_on = run.card or decision.card
        if run.fits is False and placed_on is not None and size.prediction is not None:
            gpu, room = placed_on.gpu, placed_on.memory_gib * run.demand.gpus_per_worker
            text.append(
                f"caution: {trial_id} is predicted to need {gpu.footprint(size.prediction.peak_reserved) / GIB:.1f} "
                f"GiB of a GPU and may take {room:.1f}; it runs all the same"
            )
            text += [f"    what takes less: {way.line()}" for way in size.less]
    return [*text, *_held_to_kinds(decision)]


def _held_to_kinds(decision: Decision) -> list[str]:
    """Which trials run on one kind of the cluster's GPUs alone, a line a kind."""
    ids: dict[str, list[str]] = {}
    for run in decision.runs:
        if run.demand.accelerator is not None:
            ids.setdefault(run.demand.accelerator, []).extend(trial.trial_id for trial in run.trials)
    return [
        f"on {kind.removeprefix('accelerator_type:')} alone, since the cluster's smallest GPUs cannot hold them: "
        f"{', '.join(trials)}"
        for kind, trials in ids.items()
    ]


def demand_text(demand: Demand) -> str:
    """What a run holds, such as `0.25 of a GPU and 4 CPU cores`."""
    cores = f"{demand.cpus_per_worker} CPU core{'s' if demand.cpus_per_worker > 1 else ''}"
    share = f"{demand.gpus_per_worker:g} of a GPU and {cores}" if demand.gpus_per_worker else cores
    return f"{demand.num_workers} workers of {share}" if demand.num_workers > 1 else share


def _summary(trials: int, decision: Decision) -> str:
    fitting = sum(len(run.trials) for run in decision.runs if run.fits is True)
    unknown = sum(len(run.trials) for run in decision.runs if run.size.prediction is None)
    at_once = f"at most {decision.at_once} at once, the largest first"
    if decision.card is None:
        return at_once
    return (
        f"{fitting} of {trials} trials fit {decision.card.memory_gib:g} GiB"
        f"{f', {unknown} cannot be predicted' if unknown else ''}; {at_once}"
    )
