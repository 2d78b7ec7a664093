"""Which trials of a sweep train together on one base: decided from values, before what runs where."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence

from ray_peft.schedule.decide import Card, Node, Pack, uses_gpu
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.tasks.base import PackForecast
from ray_peft.vram.fit import Size

PACK = "train.pack"
MOST_MEMBERS = 16
"""Trials of a pack at most: the gain of a further one is small by then, and a killed process interrupts all."""
WORTH = 1.2
"""Times as long that the trials' steps must take one after the other: attaching, saving and scoring gain nothing."""

GENERATIONS = 4
"""Times at least that a search of packs learns from rows, where it has enough samples."""

Forecast = Callable[[Sequence[TrialSpec]], PackForecast | None]
"""What is predicted of trials that train together, as they run; None if nothing predicts it."""


def packs(
    trials: Sequence[TrialSpec],
    nodes: Sequence[Node],
    card: Card | None,
    sizes: Mapping[str, Size],
    forecast: Forecast,
    alone: Collection[str] = (),
) -> list[Pack]:
    """The packs of a sweep; a trial that is in none runs by itself.

    Packs of one base are of about equal size: at least one for each GPU, as many as their memory needs, and none of
    more than MOST_MEMBERS.

    Args:
        trials: of the sweep.
        nodes: the cluster's.
        card: the GPU to plan for; None where there is none, or nothing says how large it is.
        sizes: predictions for each trial alone, by its id.
        forecast: of trials as they run, on the card.
        alone: ids of trials that share with nobody.
    """
    formed: list[Pack] = []
    for group in _groups([trial for trial in trials if trial.trial_id not in alone]):
        if _setting(group[0]) is True and (card is None or not uses_gpu(group[0], nodes)):
            formed += [Pack(tuple(part), None) for part in _parts(group, math.ceil(len(group) / MOST_MEMBERS))]
        elif card is not None and uses_gpu(group[0], nodes):
            formed += _on_gpus(group, sum(node.gpus for node in nodes), card, sizes, forecast)
    return [pack for pack in formed if len(pack.trials) > 1]


def proposed_at_a_time(samples: Sequence[TrialSpec]) -> list[TrialSpec]:
    """Of the samples of a search, as many as it proposes at a time if they train together; all if they may not."""
    if _setting(samples[0]) is False:
        return list(samples)
    return list(samples[: max(2, min(MOST_MEMBERS, len(samples) // GENERATIONS))])


def may_join(trial: TrialSpec, others: Sequence[TrialSpec]) -> bool:
    """Whether a trial may take the place of one of the others, which train together, when that one has ended."""
    return bool(_groups([trial, others[0]])) and TASKS[trial.task].follows(trial, others)


def _groups(trials: Sequence[TrialSpec]) -> list[list[TrialSpec]]:
    """Trials that may share a base and hold the same resources."""
    by_kind: dict[str, list[TrialSpec]] = {}
    for trial in trials:
        setting = _setting(trial)
        if setting is not False and not (setting == "auto" and trial.resources.gpus_per_worker is not None):
            kind = json.dumps([trial.task, setting, trial.resources.plain()], sort_keys=True)
            by_kind.setdefault(kind, []).append(trial)
    groups = [base for same in by_kind.values() for base in TASKS[same[0].task].bases(same)]
    return [group for group in groups if len(group) > 1]


def _setting(trial: TrialSpec) -> str | bool:
    setting: str | bool = getattr(trial.train, "pack", False)
    return setting


def _on_gpus(
    group: list[TrialSpec], gpus: int, card: Card, sizes: Mapping[str, Size], forecast: Forecast
) -> list[Pack]:
    """The fewest packs that fit the card and use every GPU; none if the gain is too small."""
    room = card.memory_gib * (group[0].resources.gpus_per_worker or 1.0)
    least = max(math.ceil(len(group) / MOST_MEMBERS), min(gpus, len(group) // 2))

    def formed(count: int) -> list[Pack] | None:
        """So many packs; None if one of them does not fit."""
        fitting: list[Pack] = []
        for part in _parts(group, count):
            expected = forecast([_as_it_runs(trial, sizes) for trial in part]) if len(part) > 1 else None
            if len(part) > 1 and (
                expected is None or not card.gpu.holds(expected.prediction.peak_reserved, memory_gib=room)
            ):
                return None
            fitting.append(Pack(tuple(part), expected))
        return fitting

    count = least
    while count < len(group):
        fitting = formed(count)
        if fitting is not None:
            gains = [pack.forecast.gain for pack in fitting if pack.forecast is not None]
            return fitting if _setting(group[0]) is True or min(gains) >= WORTH else []
        count = max(count + 1, count * 5 // 4)  # a prediction of another number takes seconds
    return []


def _as_it_runs(trial: TrialSpec, sizes: Mapping[str, Size]) -> TrialSpec:
    chosen = sizes[trial.trial_id].chosen if trial.trial_id in sizes else {}
    return trial.changed(chosen) if chosen else trial


def _parts(group: Sequence[TrialSpec], count: int) -> list[list[TrialSpec]]:
    """So many parts of about equal size, in the order of the group."""
    edges = [round(place * len(group) / count) for place in range(count + 1)]
    return [list(group[first:last]) for first, last in zip(edges, edges[1:], strict=False)]
