"""What a user must know of a cluster that a sweep has joined, before its trials start."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ray_peft.errors import PlacementError
from ray_peft.foundation.audience import Audience
from ray_peft.schedule import cluster
from ray_peft.schedule.autoscaler import grown
from ray_peft.schedule.decide import Node
from ray_peft.spec import TrialSpec

SHARED_LOOK_S = 30.0
"""Longest wait for whether the nodes see the output folder: a worker process starts there for it."""
FREED_WITHIN_S = 3.0
"""Ray says some time later that what a task held is free."""


def joined(nodes: list[Node], trials: Sequence[TrialSpec], folder: Path, console: Audience) -> list[Node]:
    """The nodes of a cluster that this process has joined, once they can hold the trials; those of its own as they are.

    Args:
        nodes: the cluster's.
        trials: those that are to run.
        folder: where they write.
        console: is told what the user would wonder about.

    Raises:
        PlacementError: a node does not see the folder.
    """
    if started_here():
        return nodes
    after = grown(nodes, trials, console, lambda: cluster.nodes_now(measured=False))
    if after is not nodes:
        nodes = cluster.nodes_now()
    check_shared(folder)
    if (word := in_use()) is not None:
        console.say(word)
    return nodes


def started_here() -> bool:
    """Whether this process started the Ray that it uses: nobody adds machines to that."""
    import ray._private.worker

    node = ray._private.worker._global_node
    return node is not None and node.is_head()


def in_use() -> str | None:
    """What other jobs of the cluster hold, as a sentence; None where all of it is free."""
    import ray

    until = time.monotonic() + FREED_WITHIN_S
    while True:
        everything, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
        in_use_by_kind = {kind: everything.get(kind, 0.0) - free.get(kind, 0.0) for kind in ("GPU", "CPU")}
        if not any(amount > 0.01 for amount in in_use_by_kind.values()):
            return None
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    amounts = " and ".join(
        f"{amount:g} of {everything[kind]:g} {kind}s" for kind, amount in in_use_by_kind.items() if amount > 0.01
    )
    return f"other jobs hold {amounts} of the cluster: trials start as these become free"


def check_shared(folder: Path) -> None:
    """Make sure that all nodes see a folder of this machine.

    Raises:
        PlacementError: one of them does not.
    """
    import ray

    mark = folder / f".shared-{os.urandom(4).hex()}"
    nodes = {node["NodeID"]: str(node["NodeManagerHostname"]) for node in cluster.alive_nodes()}
    if set(nodes) <= {ray.get_runtime_context().get_node_id()}:
        return
    mark.touch()
    try:
        answers = cluster.answers_of(list(nodes), partial(os.path.exists, str(mark)), within_s=SHARED_LOOK_S)
        blind = [nodes[node] for node, seen_there in answers if not seen_there]
    finally:
        mark.unlink(missing_ok=True)
    if blind:
        raise PlacementError(
            f"--out {folder}: not seen on {', '.join(sorted(blind))}, where trials would write into a folder of their "
            "own; mount it there, or give a folder that all nodes share (--out, RAY_PEFT_OUTPUTS)"
        )
