"""What runs where, with which share of a GPU, which cores and which settings: decided from values, without Ray."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ray_peft.errors import PlacementError
from ray_peft.foundation.units import GIB
from ray_peft.spec import ResourcesSpec, TrialSpec
from ray_peft.tasks.base import PackForecast
from ray_peft.vram.cards import ANY, Gpu, known
from ray_peft.vram.fit import Size

PARTS = 32
"""A GPU is shared in parts of this many: multiples of a power of two add up without rounding."""


@dataclass(frozen=True)
class Node:
    """One machine of the cluster."""

    cpus: int
    gpus: int
    gpu_name: str | None = None
    """As the driver writes it; None where it was not asked or does not answer."""
    gpu_memory_gib: float | None = None
    """What is free on the smallest of its GPUs before the first trial; None where that is not known."""
    accelerator: str | None = None
    """Ray's resource that stands for its kind of GPU, such as accelerator_type:H100; None where Ray names none."""


@dataclass(frozen=True)
class Card:
    """The GPU that trials are placed on: the smallest of the cluster's."""

    gpu: Gpu
    memory_gib: float


@dataclass(frozen=True)
class Demand:
    """What a process, or each worker of a team, holds while it runs."""

    num_workers: int
    cpus_per_worker: int
    gpus_per_worker: float
    gpu_memory_gib: float | None = None
    """What it may take of each of its GPUs, the CUDA context included; None: its share of the GPU."""
    needed_gib: float | None = None
    """What of each GPU must be free before it starts; None where nothing predicts it."""
    chosen: Mapping[str, int | bool] = field(default_factory=dict)
    """What `train.fit: auto` chose for it, by key."""
    accelerator: str | None = None
    """The kind of GPU that it must have, by Ray's name; None is any."""

    def per_worker(self) -> dict[str, float]:
        """What Ray holds for each worker, by Ray's names."""
        amounts: dict[str, float] = {"CPU": self.cpus_per_worker}
        if self.gpus_per_worker:
            amounts["GPU"] = self.gpus_per_worker
        if self.accelerator is not None:
            amounts[self.accelerator] = 0.001  # every node of the kind has 1 of it
        return amounts


@dataclass(frozen=True)
class Pack:
    """Trials that train together on one base."""

    trials: tuple[TrialSpec, ...]
    forecast: PackForecast | None
    """None where they train together on demand, without a GPU."""


@dataclass(frozen=True)
class Run:
    """Trials that share a process, or a team of workers, and what it holds."""

    trials: tuple[TrialSpec, ...]
    """One, or a pack."""
    demand: Demand
    size: Size = field(default_factory=Size)
    """What is predicted of it."""
    fits: bool | None = None
    """Whether its training is predicted to fit the memory that it may take; None where nothing predicts it."""
    card: Card | None = None
    """The GPU that it is placed on, where that is not the decision's."""
    gain: float | None = None
    """Of a pack, how many times as long its trials' steps are predicted to take one after the other."""
    chosen: Mapping[str, Mapping[str, int | bool]] = field(default_factory=dict)
    """Of a pack, what `train.fit: auto` chose for each trial, by its id."""

    @property
    def trial(self) -> TrialSpec:
        """Its only trial."""
        (trial,) = self.trials
        return trial

    @property
    def is_pack(self) -> bool:
        """Whether several trials train together."""
        return len(self.trials) > 1

    def demand_of(self, trial: TrialSpec) -> Demand:
        """What the process holds, with what was chosen for one of its trials."""
        return replace(self.demand, chosen=self.chosen.get(trial.trial_id, {})) if self.is_pack else self.demand


@dataclass(frozen=True)
class Phase:
    """Runs that start together."""

    runs: tuple[Run, ...]
    """In the order in which they start, the largest first."""
    most_teams: int | None = None
    """Of runs of several workers, how many can hold all their workers at once; else None. Their workers are placed by
    Ray Train after their driver has started, so the drivers' number must be bounded."""


@dataclass(frozen=True)
class Decision:
    """What runs where, and in which order."""

    phases: tuple[Phase, ...]
    """A phase starts when the one before it has ended: trials of several workers, the others, and ensembles after what
    they are made of."""
    impossible: Mapping[str, str]
    """Why the cluster can never hold a trial, by its id."""
    card: Card | None
    """The GPU that they are placed on; None where there is none, or nothing says how large it is."""
    at_once: int
    """Most trials that run at one time."""

    @property
    def runs(self) -> list[Run]:
        """All of them, in the order in which they start."""
        return [run for phase in self.phases for run in phase.runs]

    @property
    def all_fit(self) -> bool:
        """False if a trial is predicted not to fit, or can never be held."""
        return not self.impossible and all(run.fits is not False for run in self.runs)

    def check(self) -> None:
        """Raise a PlacementError if the cluster can never hold one of the trials."""
        for reason in self.impossible.values():
            raise PlacementError(reason)


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
    smallest, name = min(sizes, key=lambda size: size[0], default=(gpu_memory_gib or 0.0, None))
    memory = smallest if gpu_memory_gib is None else min(smallest, gpu_memory_gib)
    return Card(known(name) if name else ANY, memory)


def uses_gpu(trial: TrialSpec, nodes: Sequence[Node]) -> bool:
    """Whether a trial runs on GPUs here; one that leaves it open does where the cluster has any."""
    share = trial.resources.gpus_per_worker
    return bool(share) if share is not None else any(node.gpus for node in nodes)


def decide(
    trials: Sequence[TrialSpec],
    nodes: Sequence[Node],
    sizes: Mapping[str, Size],
    *,
    gpu_memory_gib: float | None = None,
    alone: Collection[str] = (),
    packs: Sequence[Pack] = (),
) -> Decision:
    """Where trials run.

    Several trials share a GPU where their predicted bytes fit it together. A trial of several workers never shares: its
    workers exchange gradients and wait for each other. Nor does one whose size is not known.

    Args:
        trials: an ensemble after its members.
        nodes: the cluster's.
        sizes: predictions for `card(nodes, gpu_memory_gib)` by trial id; a trial without one is of unknown size.
        gpu_memory_gib: what trials may take of a GPU, to see whether they fit a smaller one; None is all of it.
        alone: ids of trials that share with nobody.
        packs: those of the trials that train together (schedule/packs.py).
    """
    gpu = card(nodes, gpu_memory_gib)
    runs: list[Run] = []
    impossible: dict[str, str] = {}
    packed = {trial.trial_id for pack in packs for trial in pack.trials}
    single = [Pack((trial,), None) for trial in trials if trial.trial_id not in packed]
    for group in (*single, *packs):
        first, share = group.trials[0], None
        size = Size(group.forecast.prediction) if group.forecast else Size()
        if len(group.trials) == 1:
            size = sizes.get(first.trial_id, Size())
        may_share = first.resources.num_workers == 1 and first.trial_id not in alone
        if gpu is not None and size.prediction is not None and may_share:
            share = share_of(gpu.gpu.footprint(size.prediction.needed), gpu.memory_gib)
        try:
            demand = _demand(first, nodes, share)
        except PlacementError as error:
            impossible |= {trial.trial_id: str(error) for trial in group.trials}
            continue
        run = _run(group.trials, demand, size, gpu, limited=gpu_memory_gib is not None)
        if run.is_pack:
            chosen = {trial.trial_id: sizes[trial.trial_id].chosen for trial in group.trials if trial.trial_id in sizes}
            run = replace(run, gain=group.forecast.gain if group.forecast else None, chosen=chosen)
        runs.append(run)
    phases, at_once = phases_of(runs, nodes)
    return Decision(phases, impossible, gpu, at_once)


def phases_of(runs: Sequence[Run], nodes: Sequence[Node]) -> tuple[tuple[Phase, ...], int]:
    """Runs in the order in which they start, and how many trials run at one time at most."""
    runs = sorted(runs, key=_predicted_bytes, reverse=True)
    teams = [run for run in runs if run.demand.num_workers > 1]
    singles = [run for run in runs if run.demand.num_workers == 1 and not run.trials[0].members()]
    ensembles = [run for run in runs if run.demand.num_workers == 1 and run.trials[0].members()]
    most_teams = _most_teams([run.demand for run in teams], nodes) if teams else None
    phases = (Phase(tuple(teams), most_teams), Phase(tuple(singles)), Phase(tuple(ensembles)))
    at_once = max(min(len(teams), most_teams or 0), _most_at_once(singles, nodes), _most_at_once(ensembles, nodes))
    return tuple(phase for phase in phases if phase.runs), at_once


def share_of(footprint: int, gpu_memory_gib: float) -> float:
    """The share of a GPU that holds `footprint` bytes, rounded up to a part; at most 1."""
    return min(PARTS, math.ceil(footprint / (gpu_memory_gib * GIB) * PARTS)) / PARTS


def _run(trials: tuple[TrialSpec, ...], demand: Demand, size: Size, card: Card | None, *, limited: bool) -> Run:
    """Trials with what they may take of a GPU, and what of it must be free."""
    if card is None:
        return Run(trials, demand, size)
    room = card.memory_gib * (demand.gpus_per_worker or 1.0)
    fits, free = None, None
    if size.prediction is not None:
        # An evaluation can go on with less than it would take, so only training waits for its memory.
        least = size.prediction.peak_reserved
        fits = card.gpu.holds(least, memory_gib=room)
        free = (card.gpu.footprint(least) - card.gpu.margin) / GIB if fits else None
    if not demand.gpus_per_worker:
        return Run(trials, demand, size, fits)
    capped = demand.gpus_per_worker < 1 or limited
    placed = replace(demand, gpu_memory_gib=room if capped else None, needed_gib=free, chosen=size.chosen)
    return Run(trials, placed, size, fits)


def _predicted_bytes(run: Run) -> tuple[int, int]:
    """By which runs are ordered; zeros where no GPU is used, or nothing predicts it."""
    prediction = run.size.prediction
    used = prediction is not None and run.demand.gpus_per_worker
    return (prediction.needed, prediction.peak_reserved) if prediction is not None and used else (0, 0)


def _demand(trial: TrialSpec, nodes: Sequence[Node], share: float | None) -> Demand:
    """What a trial holds here, with what its spec leaves open filled in.

    An open `gpus_per_worker` is `share`, else one GPU where the cluster has any, else none. An open `cpus_per_worker`
    is all cores of a node for a CPU trial, and a GPU's share of its node's cores for a GPU trial.

    Raises:
        PlacementError: the cluster can never hold it.
    """
    if not nodes:
        raise PlacementError("the cluster has no node with a CPU core; check `ray status`")
    resources = trial.resources
    gpus = resources.gpus_per_worker
    if gpus is None:
        gpus = (share or 1.0) if uses_gpu(trial, nodes) else 0.0
    _check_gpus(trial.trial_id, resources, gpus, sum(node.gpus for node in nodes))
    eligible = [node for node in nodes if node.gpus > 0] if gpus else nodes
    cpus = resources.cpus_per_worker or _fair_cpus(eligible, gpus, resources.num_workers)
    most = max(node.cpus for node in eligible)
    if cpus > most:
        raise PlacementError(
            f"trial {trial.trial_id} needs {cpus} CPU cores on one node, but the largest node here has {most}; "
            "lower resources.cpus_per_worker, or leave it out"
        )
    room = sum(node.cpus // cpus for node in eligible)
    if resources.num_workers > room:
        raise PlacementError(
            f"trial {trial.trial_id} needs {resources.num_workers} workers of {cpus} CPU cores, but the cluster holds "
            f"{room} of them; lower resources.num_workers or resources.cpus_per_worker"
        )
    return Demand(resources.num_workers, cpus, gpus)


def _check_gpus(trial: str, resources: ResourcesSpec, gpus: float, cluster_gpus: int) -> None:
    needed = gpus * resources.num_workers
    if needed <= cluster_gpus:
        return
    ways = ["lower resources.num_workers"] if cluster_gpus and resources.num_workers > 1 else []
    ways += ["set resources.gpus_per_worker: 0 to use the CPU", "or join a cluster that has them with --address"]
    raise PlacementError(
        f"trial {trial} needs {needed:g} GPUs ({resources.num_workers} workers of {gpus:g}), but there are "
        f"{cluster_gpus} here; {', '.join(ways)}"
    )


def _fair_cpus(eligible: Sequence[Node], gpus: float, num_workers: int) -> int:
    if gpus:
        return max(1, min(int(node.cpus / node.gpus * gpus) for node in eligible))
    return max(1, min(node.cpus for node in eligible) // num_workers)


def _most_teams(demands: Sequence[Demand], nodes: Sequence[Node]) -> int:
    """Teams of workers that the cluster holds at once, by the largest of them; at least 1."""
    largest = max(demands, key=lambda demand: (demand.num_workers * demand.gpus_per_worker, demand.num_workers))
    if largest.gpus_per_worker:
        room = int(sum(node.gpus for node in nodes) // (largest.num_workers * largest.gpus_per_worker))
    else:
        room = sum(node.cpus for node in nodes) // (largest.num_workers * largest.cpus_per_worker)
    return max(1, room)


def _most_at_once(runs: Sequence[Run], nodes: Sequence[Node]) -> int:
    """Trials of one worker that run at one time, when the runs that need the least come together."""
    all_cpus, all_gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)

    def part(demand: Demand) -> float:
        """The part of the cluster that it holds, by what it holds most of."""
        return max(demand.cpus_per_worker / all_cpus, demand.gpus_per_worker / all_gpus if all_gpus else 0.0)

    cpus = [node.cpus for node in nodes]
    gpus = [[1.0] * node.gpus for node in nodes]
    count = 0
    for run in sorted(runs, key=lambda run: part(run.demand)):
        demand = run.demand
        for number in range(len(nodes)):
            # A sum of shares such as 0.1 is rounded.
            free = [gpu for gpu, left in enumerate(gpus[number]) if left > demand.gpus_per_worker - 1e-6]
            if cpus[number] >= demand.cpus_per_worker and (free or not demand.gpus_per_worker):
                cpus[number] -= demand.cpus_per_worker
                if demand.gpus_per_worker:
                    gpus[number][free[0]] -= demand.gpus_per_worker
                count += len(run.trials)
                break
    return count
