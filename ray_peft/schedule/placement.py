"""What a trial holds on this cluster and how many run at once: arithmetic only, no Ray calls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ray_peft.errors import PlacementError
from ray_peft.foundation.units import GIB
from ray_peft.spec import ResourcesSpec, TrialSpec


@dataclass(frozen=True)
class Node:
    """One machine of the cluster."""

    cpus: int
    gpus: int
    gpu_name: str | None = None
    """As the driver writes it; None where it was not asked or does not answer."""
    gpu_memory_gib: float | None = None
    """What is free on the smallest of its GPUs before the first trial; None where that is not known."""


@dataclass(frozen=True)
class Demand:
    """What one trial holds while it runs."""

    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: float
    gpu_memory_gib: float | None = None
    """What it may take of each of its GPUs, the CUDA context included; None: its share of the GPU."""
    needed_gib: float | None = None
    """What of each GPU must be free before it starts; None where nothing predicts it."""
    chosen: Mapping[str, int | bool] = field(default_factory=dict)
    """What `train.fit: auto` chose for it, by key."""


def demand(spec: TrialSpec, nodes: list[Node], share: float | None = None) -> Demand:
    """What a trial holds here, with what its spec leaves open filled in.

    An open `gpus_per_worker` is `share`, else one GPU where the cluster has any, else none. An open `cpus_per_worker`
    is all cores of a node for a CPU trial, and a GPU's share of its node's cores for a GPU trial.

    Raises:
        PlacementError: the cluster can never hold it.
    """
    if not nodes:
        raise PlacementError("the cluster has no node with a CPU core; check `ray status`")
    asked = spec.resources
    cluster_gpus = sum(node.gpus for node in nodes)
    gpus = asked.gpus_per_worker
    if gpus is None:
        gpus = share if share is not None else float(cluster_gpus > 0)
    _check_gpus(spec.trial_id, asked, gpus, cluster_gpus)
    eligible = [node for node in nodes if node.gpus > 0] if gpus else nodes
    cpus = asked.cpus_per_worker or _fair_cpus(eligible, gpus, asked.num_workers)
    most = max(node.cpus for node in eligible)
    if cpus > most:
        raise PlacementError(
            f"trial {spec.trial_id} needs {cpus} CPU cores on one node, but the largest node here has {most}; "
            "lower resources.cpus_per_worker, or leave it out"
        )
    room = sum(node.cpus // cpus for node in eligible)
    if asked.num_workers > room:
        raise PlacementError(
            f"trial {spec.trial_id} needs {asked.num_workers} workers of {cpus} CPU cores, but the cluster holds "
            f"{room} of them; lower resources.num_workers or resources.cpus_per_worker"
        )
    return Demand(asked.num_workers, cpus, gpus)


def concurrent_trials(demands: list[Demand], nodes: list[Node]) -> int:
    """Multi-worker trials that can hold all their workers at once; at least 1.

    Their workers are placed by Ray Train after their driver has started, so the drivers' number must be bounded.
    """
    largest = max(demands, key=lambda each: (each.num_workers * each.gpus_per_worker, each.num_workers))
    if largest.gpus_per_worker:
        room = int(sum(node.gpus for node in nodes) // (largest.num_workers * largest.gpus_per_worker))
    else:
        room = sum(node.cpus for node in nodes) // (largest.num_workers * largest.cpus_per_worker)
    return max(1, room)


PARTS = 32
"""A GPU is shared in parts of this many: multiples of a power of two add up without rounding."""


@dataclass(frozen=True)
class Need:
    """What a trial is predicted to take of each of its GPUs."""

    trial_id: str
    footprint: int
    """Bytes of the card that it takes if it may: tensors, the allocator's slack, the CUDA context and the margin."""
    num_workers: int = 1
    least: int | None = None
    """Bytes without which it cannot run, if fewer: an evaluation can go on with less than it would take."""
    share: float | None = None
    """Of a GPU, where its spec asks for one."""


@dataclass(frozen=True)
class Seat:
    """Where a trial runs."""

    trial_id: str
    fits: bool
    gpu_fraction: float
    """Of a GPU, for each worker; 1 for what does not fit, which would run alone if it ran."""


@dataclass(frozen=True)
class Packing:
    """Trials on GPUs, by predicted bytes."""

    seats: tuple[Seat, ...]
    """In the order in which they start: the largest first, what does not fit last."""
    packs: tuple[tuple[str, ...], ...]
    """Trials that share a GPU, each pack at one time; the GPUs take the packs in turn."""
    at_once: int
    """Most trials that run at one time."""


def share_of(footprint: int, gpu_memory_gib: float) -> float:
    """The share of a GPU that holds `footprint` bytes, rounded up to a part; at most 1."""
    return min(PARTS, math.ceil(footprint / (gpu_memory_gib * GIB) * PARTS)) / PARTS


def fit(needs: Sequence[Need], gpu_memory_gib: float, gpus: int) -> Packing:
    """Shares of GPUs for trials of known size, and how they pack: first fit, the largest first.

    A trial of several workers never shares: its workers exchange gradients and wait for each other.
    """
    memory = gpu_memory_gib * GIB

    def fits(need: Need) -> bool:
        least = need.footprint if need.least is None else need.least
        return least <= memory * (need.share or 1.0) and need.num_workers <= gpus

    ordered = sorted(needs, key=lambda need: (not fits(need), -need.footprint, need.trial_id))
    seats: list[Seat] = []
    packs: list[list[str]] = []
    room: list[int] = []
    for need in ordered:
        alone = need.num_workers > 1 or not fits(need)
        asked = math.ceil(need.share * PARTS) if need.share is not None else None
        parts = PARTS if alone else asked or int(share_of(need.footprint, gpu_memory_gib) * PARTS)
        seats.append(Seat(need.trial_id, fits(need), need.share or parts / PARTS))
        if not fits(need):
            continue
        open_pack = next((index for index, left in enumerate(room) if left >= parts), None)
        if open_pack is None or alone:
            packs.append([need.trial_id])
            room.append(0 if alone else PARTS - parts)
        else:
            packs[open_pack].append(need.trial_id)
            room[open_pack] -= parts
    workers = {need.trial_id: need.num_workers for need in needs}
    return Packing(tuple(seats), tuple(map(tuple, packs)), _most_at_once(packs, workers, gpus))


def _most_at_once(packs: list[list[str]], workers: dict[str, int], gpus: int) -> int:
    """Trials that run at one time when the GPUs hold the fullest of the packs."""
    count = 0
    taken = {tuple(pack): workers[pack[0]] if len(pack) == 1 else 1 for pack in packs}
    for pack in sorted(taken, key=lambda pack: len(pack) / taken[pack], reverse=True):
        if taken[pack] <= gpus:
            gpus -= taken[pack]
            count += len(pack)
    return count


def _check_gpus(trial: str, asked: ResourcesSpec, gpus: float, cluster_gpus: int) -> None:
    needed = gpus * asked.num_workers
    if needed <= cluster_gpus:
        return
    ways = ["lower resources.num_workers"] if cluster_gpus and asked.num_workers > 1 else []
    ways += ["set resources.gpus_per_worker: 0 to use the CPU", "or join a cluster that has them with --address"]
    raise PlacementError(
        f"trial {trial} needs {needed:g} GPUs ({asked.num_workers} workers of {gpus:g}), but there are "
        f"{cluster_gpus} here; {', '.join(ways)}"
    )


def _fair_cpus(eligible: list[Node], gpus: float, num_workers: int) -> int:
    if gpus:
        return max(1, min(int(node.cpus / node.gpus * gpus) for node in eligible))
    return max(1, min(node.cpus for node in eligible) // num_workers)
