"""What each trial holds on the cluster at hand: its share of a GPU by predicted bytes, and what `fit: auto` chose."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ray_peft.errors import first_line
from ray_peft.foundation.audience import Audience
from ray_peft.foundation.units import GIB
from ray_peft.schedule import cluster
from ray_peft.schedule.forecast import need, size_of
from ray_peft.schedule.placement import Demand, Node, demand, share_of
from ray_peft.spec import TrialSpec
from ray_peft.vram.cards import ANY, Gpu, known
from ray_peft.vram.fit import Size

PATIENCE_S = 1.0
"""Predictions that are on disk take milliseconds; after this long, the others are made elsewhere."""


@dataclass(frozen=True)
class Card:
    """The GPU that trials are placed on: the smallest of the cluster's."""

    gpu: Gpu
    memory_gib: float


def card(nodes: Sequence[Node], gpu_memory_gib: float | None = None) -> Card | None:
    """The GPU to plan for; None where there is none, or nothing says how large it is.

    Args:
        nodes: the cluster's.
        gpu_memory_gib: what trials may take of a GPU, if that is less than there is.
    """
    with_gpus = [node for node in nodes if node.gpus]
    sizes = [(node.gpu_memory_gib, node.gpu_name) for node in with_gpus if node.gpu_memory_gib is not None]
    if not with_gpus or (len(sizes) < len(with_gpus) and gpu_memory_gib is None):
        return None
    smallest, name = min(sizes, default=(gpu_memory_gib or 0.0, None))
    memory = smallest if gpu_memory_gib is None else min(smallest, gpu_memory_gib)
    return Card(known(name) if name else ANY, memory)


class Allotment:
    """The demands of trials, made once each."""

    def __init__(self, nodes: list[Node], gpu_memory_gib: float | None = None) -> None:
        """`gpu_memory_gib` is what trials may take of a GPU, to see whether they fit a smaller one; None is all."""
        self._nodes = nodes
        self._limit = gpu_memory_gib
        self._card = card(nodes, gpu_memory_gib)
        self._demands: dict[str, Demand] = {}

    def demand(self, spec: TrialSpec, *, alone: bool = False) -> Demand:
        """What a trial holds here.

        Several trials share a GPU where their predicted bytes fit it together. A trial of several workers never
        shares, nor does one whose size is not known, nor one that runs `alone` after its share was too small.

        Raises:
            PlacementError: the cluster can never hold it.
        """
        if alone or spec.trial_id not in self._demands:
            self._demands[spec.trial_id] = self._made(spec, self._size(spec), alone=alone)
        return self._demands[spec.trial_id]

    def prepare(self, specs: Sequence[TrialSpec], console: Audience) -> list[TrialSpec]:
        """Make the demands of trials before they start, and say which do not fit and what takes less.

        Returns:
            The trials in the order in which they are to start: the largest first.

        Raises:
            PlacementError: the cluster can never hold one of them.
        """
        sizes = self._sizes(specs)
        for spec, found in zip(specs, sizes, strict=True):
            self._demands[spec.trial_id] = self._made(spec, found, say=console.say)
        order = {spec.trial_id: found.bytes() for spec, found in zip(specs, sizes, strict=True)}
        return sorted(specs, key=lambda spec: order[spec.trial_id], reverse=True)

    def _sizes(self, specs: Sequence[TrialSpec]) -> list[Size]:
        """Of every trial; new predictions take seconds each, so they are made at once on the cluster's cores."""
        found: list[Size] = []
        begin = time.perf_counter()
        while len(found) < len(specs) and time.perf_counter() - begin < PATIENCE_S:
            found.append(self._size(specs[len(found)]))
        rest = specs[len(found) :]
        return found + (cluster.each(self._size, rest, _unknown) if rest else [])

    def _size(self, spec: TrialSpec) -> Size:
        if self._card is None or not demand(spec, self._nodes).gpus_per_worker:
            return Size(spec, None)
        try:
            return size_of(spec, self._card.gpu, self._card.memory_gib)
        except Exception as error:  # no trial depends on its prediction
            return _unknown(spec, error)

    def _made(
        self, spec: TrialSpec, found: Size, *, alone: bool = False, say: Callable[[str], None] = lambda _: None
    ) -> Demand:
        plain = demand(spec, self._nodes)
        if found.problem:
            say(f"no memory prediction of {spec.trial_id}: {found.problem}")
        if not plain.gpus_per_worker or self._card is None:
            return plain
        gpu, memory = self._card.gpu, self._card.memory_gib
        needed = need(spec.trial_id, found, gpu)
        share = None
        if needed is not None and plain.num_workers == 1 and not alone:
            share = share_of(needed.footprint, memory)
        made = demand(spec, self._nodes, share)
        room = memory * made.gpus_per_worker
        least = needed.least if needed is not None else None
        # An evaluation can go on with less than it would take, so only training waits for its memory.
        free = (least - gpu.margin) / GIB if least is not None and least <= room * GIB else None
        if least is not None and free is None:
            say(
                f"caution: {spec.trial_id} is predicted to need {least / GIB:.1f} GiB of a GPU and may take "
                f"{room:.1f}; it runs all the same"
            )
            for way in found.less:
                say(f"    what takes less: {way.line()}")
        return replace(
            made,
            gpu_memory_gib=room if made.gpus_per_worker < 1 or self._limit is not None else None,
            needed_gib=free,
            chosen=found.chosen,
        )


def _unknown(spec: TrialSpec, error: Exception) -> Size:
    return Size(spec, None, problem=f"{type(error).__name__}: {first_line(error)}")
