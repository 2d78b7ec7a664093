"""What a trial holds on this cluster and how many run at once: arithmetic only, no Ray calls."""

from __future__ import annotations

from dataclasses import dataclass

from ray_peft.errors import PlacementError
from ray_peft.spec import ResourcesSpec, TrialSpec


@dataclass(frozen=True)
class Node:
    """One machine of the cluster."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class Demand:
    """What one trial holds while it runs."""

    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: float


def demand(spec: TrialSpec, nodes: list[Node]) -> Demand:
    """What a trial holds here, with what its spec leaves open filled in.

    An open `gpus_per_worker` is one GPU where the cluster has any, else none. An open `cpus_per_worker` is all cores
    of a node for a CPU trial, and a GPU's share of its node's cores for a GPU trial.

    Raises:
        PlacementError: the cluster can never hold it.
    """
    if not nodes:
        raise PlacementError("the cluster has no node with a CPU core; check `ray status`")
    asked = spec.resources
    cluster_gpus = sum(node.gpus for node in nodes)
    gpus = asked.gpus_per_worker if asked.gpus_per_worker is not None else float(cluster_gpus > 0)
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
