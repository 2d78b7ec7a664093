"""Machines that a cluster does not have yet: asked of Ray's autoscaler, and waited for with a word."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence

from ray_peft.foundation.audience import Audience
from ray_peft.foundation.durations import short_time
from ray_peft.schedule.decide import Node, decide
from ray_peft.spec import TrialSpec

NO_SIGN_S = 45.0
"""An autoscaler that can help starts to within some seconds; a cluster without one never does."""
LONGEST_S = 20 * 60.0
"""A cloud that has not delivered by then is out of such machines."""
WORD_EVERY_S = 30.0
_POLL_S = 2.0
_STATUS = b"__autoscaling_status"
"""Where the first version of Ray's autoscaler keeps its report."""


def bundles(trials: Sequence[TrialSpec], nodes: Sequence[Node]) -> list[dict[str, float]]:
    """What the cluster lacks for the trial that can run least: one bundle a worker; nothing if all can run.

    A trial that leaves its GPUs open gets one where the cluster has no machine for trials at all: a head without cores
    is one that leaves the work to machines that come on demand.
    """
    impossible = decide(trials, nodes, {}).impossible
    lacking = [trial for trial in trials if trial.trial_id in impossible]
    if not lacking:
        return []

    def bundle(trial: TrialSpec) -> dict[str, float]:
        gpus = trial.resources.gpus_per_worker
        share = 1.0 if gpus is None else math.ceil(gpus)
        cpus = float(trial.resources.cpus_per_worker or 1)
        return {"CPU": cpus, "GPU": share} if share else {"CPU": cpus}

    largest = max(
        lacking, key=lambda trial: (trial.resources.num_workers, *sorted(bundle(trial).items(), reverse=True))
    )
    return [bundle(largest)] * largest.resources.num_workers


def grown(
    nodes: list[Node], trials: Sequence[TrialSpec], console: Audience, look: Callable[[], list[Node]]
) -> list[Node]:
    """The cluster's nodes once they can hold the trials; as they are if no autoscaler brings more.

    Args:
        nodes: the cluster's, now.
        trials: those that are to run.
        console: is told what is waited for.
        look: gives the nodes anew.
    """
    missing = bundles(trials, nodes)
    if not missing:
        return nodes
    from ray.autoscaler.sdk import request_resources

    machine = ", ".join(f"{amount:g} {kind}" for kind, amount in missing[0].items())
    need = f"{len(missing)} x ({machine})" if len(missing) > 1 else machine
    console.say(f"the cluster has no room for a trial of {need}: Ray's autoscaler is asked for it")
    request_resources(bundles=missing)
    begin = last_word = time.monotonic()
    sign = False
    try:
        while (waited := time.monotonic() - begin) < (LONGEST_S if sign else NO_SIGN_S):
            time.sleep(_POLL_S)
            nodes = look()
            missing_now = bundles(trials, nodes)
            if not missing_now:
                console.say(f"a machine has joined after {short_time(waited)}")
                return nodes
            sign = sign or launching()
            if time.monotonic() - last_word > WORD_EVERY_S:
                last_word = time.monotonic()
                state = "it is starting machines" if sign else "no machine is starting yet"
                console.say(f"waiting for {need} for {short_time(waited)}: {state}; see also `ray status`")
    finally:
        request_resources(bundles=[])  # what trials wait for is asked for by itself from now on
    if not sign:
        console.say("no machine is starting: this cluster has no autoscaler, or none of its node types has that")
    return nodes


def launching() -> bool:
    """Whether the autoscaler says that machines are starting."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_get

    with contextlib.suppress(Exception):  # the report of another version: nothing depends on it but a word
        report = json.loads(_internal_kv_get(_STATUS) or b"{}").get("autoscaler_report") or {}
        if report.get("pending_launches") or report.get("pending_nodes"):
            return True
    with contextlib.suppress(Exception):
        from ray.autoscaler.v2.sdk import get_cluster_status

        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        return bool(status.pending_launches or status.pending_nodes)
    return False
