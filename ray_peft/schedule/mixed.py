"""Clusters of unlike GPUs: what does not fit the smallest kind is planned for a larger one, and runs there alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ray_peft.schedule.decide import Decision, Node, Run, phases_of
from ray_peft.spec import TrialSpec


def kinds(nodes: Sequence[Node]) -> list[tuple[str, list[Node]]]:
    """The cluster's kinds of GPU by Ray's names, the smallest first; empty where they cannot be told apart."""
    groups: dict[str, list[Node]] = {}
    for node in nodes:
        if node.gpus and (node.accelerator is None or node.gpu_memory_gib is None):
            return []
        if node.gpus and node.accelerator is not None:
            groups.setdefault(node.accelerator, []).append(node)
    return sorted(groups.items(), key=lambda group: _smallest_gib(group[1]))


def spread(
    decision: Decision, nodes: Sequence[Node], decide_on: Callable[[Sequence[TrialSpec], Sequence[Node]], Decision]
) -> Decision:
    """A decision for the smallest kind, with the runs that do not fit it moved to the smallest kind that they fit.

    What fits none is moved to the largest. Runs that fit the smallest may start anywhere.

    Args:
        decision: for all nodes.
        nodes: the cluster's.
        decide_on: decides for trials on some of the nodes, by their own GPUs.
    """
    groups = kinds(nodes)
    homeless = [run for run in decision.runs if run.fits is False and run.demand.gpus_per_worker]
    if len(groups) < 2 or not homeless:
        return decision
    trials = [trial for run in homeless for trial in run.trials]
    moved: list[Run] = []
    for number, (name, group) in enumerate(groups[1:], start=2):
        if not trials:
            break
        part = decide_on(trials, group)
        placed = [run for run in part.runs if run.fits is not False or number == len(groups)]
        moved += [replace(run, demand=replace(run.demand, accelerator=name), card=part.card) for run in placed]
        settled = {trial.trial_id for run in placed for trial in run.trials}
        trials = [trial for trial in trials if trial.trial_id not in settled]
    left = {trial.trial_id for trial in trials}  # their cores are on the smallest kind's nodes alone
    stay = [run for run in decision.runs if run not in homeless or _ids(run) & left]
    on_own_nodes = {trial_id for run in stay for trial_id in _ids(run)}  # a pack stays whole
    phases, at_once = phases_of([*stay, *(run for run in moved if not _ids(run) & on_own_nodes)], nodes)
    return replace(decision, phases=phases, at_once=at_once)


def _ids(run: Run) -> set[str]:
    return {trial.trial_id for trial in run.trials}


def _smallest_gib(nodes: Sequence[Node]) -> float:
    return min(node.gpu_memory_gib for node in nodes if node.gpu_memory_gib is not None)
