"""The memory and the training time of a compared unit; a row of an ensemble holds those of its members."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from ray_peft.report.table import Row, SeedGroup

_LOST = "a trial went on from a checkpoint of version 0.1.0, which does not say what came before it"


_PACKED = "trials trained together on one base"


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of units, in their order; None where it was not measured."""

    memory_gib: tuple[float | None, ...]
    """The greatest peak over the seeds."""
    time_s: tuple[float | None, ...]
    """Training time, the mean over the seeds."""
    memory_problem: str | None = None
    """Why the peaks cannot be compared; None if they can."""
    time_problem: str | None = None
    """Why the times cannot be compared; None if they can."""


def costs(units: Sequence[SeedGroup]) -> Costs:
    """The costs of the finished trials of each unit."""
    finished = [row for unit in units for row in unit.finished]
    kinds = {row.on_gpu for row in finished if row.peak_memory_gib is not None}
    timed = [row.result.provenance for row in finished if row.result.usage.train_s]
    places = {(provenance.device, provenance.num_workers) for provenance in timed}
    shared = any(0 < provenance.gpus_per_worker < 1 for provenance in timed)
    packed = any(row.result.pack_size > 1 for row in finished)
    resumed = any(not row.result.usage.complete for row in finished)
    passes = {_passes(row) for row in finished if row.on_gpu and row.result.trainable_parameters}
    return Costs(
        memory_gib=tuple(_over_seeds(unit, lambda row: row.peak_memory_gib, max) for unit in units),
        time_s=tuple(_over_seeds(unit, lambda row: row.seconds("train_s"), fmean) for unit in units),
        memory_problem="some peaks are of a GPU and some of a process"
        if len(kinds) > 1
        else f"{_PACKED}, and their peaks are those of all of them"
        if packed
        else "memory decided the rows per pass, and they differ"
        if len(passes) > 1
        else _LOST
        if resumed
        else None,
        time_problem="the trials ran on different devices or numbers of workers"
        if len(places) > 1
        else f"{_PACKED}, and their times are shares; train.pack: false gives each its own"
        if packed
        else "trials shared a GPU; resources.gpus_per_worker: 1 gives each its own"
        if shared
        else _LOST
        if resumed
        else None,
    )


def _passes(row: Row) -> tuple[object, ...]:
    """What memory decided of a trial's passes: by `fit: auto`, or by running out of it."""
    settings = row.result.chosen | row.result.lowered
    return tuple(sorted((key, value) for key, value in settings.items() if key.startswith("train.")))


def _over_seeds(
    unit: SeedGroup, read: Callable[[Row], float | None], fold: Callable[[list[float]], float]
) -> float | None:
    values = [value for row in unit.finished if (value := read(row)) is not None]
    return fold(values) if values else None
