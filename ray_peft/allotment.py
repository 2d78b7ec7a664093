"""What each trial holds on the cluster at hand: its share of a GPU by predicted bytes, and what `fit: auto` chose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ray_peft.console import Console
from ray_peft.errors import first_line
from ray_peft.forecast import Size, size, ways
from ray_peft.gpus import ANY, Gpu, known
from ray_peft.measure import GIB
from ray_peft.placement import Demand, Node, demand, share_of
from ray_peft.spec import TrialSpec


@dataclass(frozen=True)
class Card:
    """The GPU that trials are placed on: the smallest of the cluster's."""

    gpu: Gpu
    memory_gib: float


def card(nodes: Sequence[Node], gpu_memory_gib: float | None = None) -> Card | None:
    """The GPU to plan for; null where there is none, or nothing says how large it is.

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
        """`gpu_memory_gib` is what trials may take of a GPU, to see whether they fit a smaller one; null is all."""
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
            self._demands[spec.trial_id], _ = self._made(spec, alone=alone)
        return self._demands[spec.trial_id]

    def prepare(self, specs: Sequence[TrialSpec], console: Console) -> list[TrialSpec]:
        """Make the demands of trials before they start, and say which do not fit and what takes less.

        Returns:
            The trials in the order in which they are to start: the largest first.

        Raises:
            PlacementError: the cluster can never hold one of them.
        """
        sizes = {}
        for spec in specs:
            self._demands[spec.trial_id], found = self._made(spec, say=console.say)
            predicted = found.prediction if found is not None else None
            sizes[spec.trial_id] = (predicted.needed, predicted.peak_reserved) if predicted is not None else (0, 0)
        return sorted(specs, key=lambda spec: sizes[spec.trial_id], reverse=True)

    def _made(
        self, spec: TrialSpec, *, alone: bool = False, say: Callable[[str], None] = lambda _: None
    ) -> tuple[Demand, Size | None]:
        plain = demand(spec, self._nodes)
        if not plain.gpus_per_worker or self._card is None:
            return plain, None
        gpu, memory = self._card.gpu, self._card.memory_gib
        try:
            found = size(spec, gpu, memory)
        except Exception as error:  # no trial depends on its prediction
            say(f"no memory prediction of {spec.trial_id}: {type(error).__name__}: {first_line(error)}")
            found = Size(spec, None)
        need = found.need(spec.trial_id, gpu)
        share = None
        if need is not None and plain.num_workers == 1 and not alone:
            share = share_of(need.footprint, memory)
        made = demand(spec, self._nodes, share)
        room = memory * made.gpus_per_worker
        free = min(room, need.footprint / GIB) - gpu.margin / GIB if need is not None else None
        if need is not None and need.least is not None and need.least > room * GIB:
            free = None  # there is nothing to wait for
            say(
                f"caution: {spec.trial_id} is predicted to need {need.least / GIB:.1f} GiB of a GPU and may take "
                f"{room:.1f}; it runs all the same"
            )
            for way in ways(found.runs, gpu, room):
                say(f"    what takes less: {way.line()}")
        return replace(
            made,
            gpu_memory_gib=room if made.gpus_per_worker < 1 or self._limit is not None else None,
            needed_gib=free,
            chosen=found.chosen,
        ), found
