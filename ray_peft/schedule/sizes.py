"""Decides for the cluster at hand, from the trials' predicted memory; each prediction is computed once."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Sequence
from functools import partial

from ray_peft.errors import first_line
from ray_peft.schedule import cluster
from ray_peft.schedule.decide import Card, Decision, Node, card, decide, uses_gpu
from ray_peft.schedule.mixed import spread
from ray_peft.schedule.packs import packs
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.tasks.base import PackForecast
from ray_peft.vram.fit import Size, size
from ray_peft.vram.predict import decides_memory

logger = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""Predictions that are on disk take milliseconds, others a second or two; after this long, the rest is computed on the
cluster, whose processes first import torch for as long."""


class Scheduler:
    """Decides for the trials of a cluster."""

    def __init__(self, nodes: Sequence[Node], gpu_memory_gib: float | None = None) -> None:
        """`gpu_memory_gib` is what trials may take of a GPU, to see whether they fit a smaller one; None is all."""
        self._nodes = nodes
        self._gpu_memory_gib = gpu_memory_gib
        self._sizes: dict[str, Size] = {}

    def decide(self, trials: Sequence[TrialSpec], *, alone: Collection[str] = ()) -> Decision:
        """Where trials run; those whose ids are in `alone` share with nobody.

        Raises:
            PlacementError: the cluster can never hold one of them.
        """
        decide(trials, self._nodes, {}).check()  # before predictions, which take seconds
        new = [trial for trial in trials if trial.trial_id not in self._sizes]
        self._sizes |= predicted_sizes(new, self._nodes, self._gpu_memory_gib)
        target = card(self._nodes, self._gpu_memory_gib)
        formed = packs(trials, self._nodes, target, self._sizes, partial(forecast, target), alone)
        decision = decide(
            trials, self._nodes, self._sizes, gpu_memory_gib=self._gpu_memory_gib, alone=alone, packs=formed
        )
        decision.check()
        return spread(decision, self._nodes, partial(self._decide_on, alone=alone))

    def _decide_on(self, trials: Sequence[TrialSpec], nodes: Sequence[Node], *, alone: Collection[str]) -> Decision:
        """Where trials would run on some of the nodes."""
        sizes = predicted_sizes(trials, nodes, self._gpu_memory_gib)
        return decide(trials, nodes, sizes, gpu_memory_gib=self._gpu_memory_gib, alone=alone)


def predicted(trial: TrialSpec, target: Card) -> Size:
    """A trial's size on a card, by its task's prediction.

    Raises:
        DataError, ModelError: the user's to mend.
    """
    return size(trial, TASKS[trial.task].predictor(trial), target.gpu, target.memory_gib)


def forecast(target: Card | None, trials: Sequence[TrialSpec]) -> PackForecast | None:
    """What is predicted of trials that train together on a card; None if nothing can predict it."""
    if target is None:
        return None
    try:
        return TASKS[trials[0].task].forecast(trials, target.gpu)
    except Exception as error:  # trials run by themselves, too
        logger.warning("no prediction of trials together: %s: %s", type(error).__name__, error)
        return None


def predicted_sizes(
    trials: Sequence[TrialSpec], nodes: Sequence[Node], gpu_memory_gib: float | None = None
) -> dict[str, Size]:
    """The sizes of trials that use a GPU of known memory, by trial id; one that fails says why, and stops nothing.

    New predictions take seconds each: many are made at once on the cluster's cores. Trials that differ in what changes
    no memory, such as a learning rate or a seed, have one.
    """
    target = card(nodes, gpu_memory_gib)
    if target is None:
        return {}
    alike: dict[str, list[TrialSpec]] = {}
    for trial in trials:
        if uses_gpu(trial, nodes):
            alike.setdefault(_decides_memory(trial), []).append(trial)
    first = [same[0] for same in alike.values()]
    sizes: list[Size] = []
    begin = time.perf_counter()
    while len(sizes) < len(first) and time.perf_counter() - begin < PATIENCE_S:
        sizes.append(_size(target, first[len(sizes)]))
    if rest := first[len(sizes) :]:
        sizes += cluster.on_all_cores(partial(_size, target), rest, lambda _, error: _unknown(error))
    return {trial.trial_id: size for same, size in zip(alike.values(), sizes, strict=True) for trial in same}


def _decides_memory(trial: TrialSpec) -> str:
    """A text that is the same for trials of the same memory."""
    return json.dumps({**trial.plain(), "seed": None, "method": decides_memory(trial.method)}, sort_keys=True)


def _size(target: Card, trial: TrialSpec) -> Size:
    try:
        return predicted(trial, target)
    except Exception as error:  # no trial depends on its prediction
        return _unknown(error)


def _unknown(error: Exception) -> Size:
    return Size(problem=f"{type(error).__name__}: {first_line(error)}")
