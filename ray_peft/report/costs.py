"""What it takes to get a compared unit: memory and training time, those of an ensemble's members included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ray_peft.report.table import Row, SeedGroup


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


def costs(units: Sequence[SeedGroup], rows: Sequence[Row]) -> Costs:
    """The costs of the finished trials of each unit; `rows` holds the members of ensembles."""
    known = {row.trial_id: row for row in rows}
    finished = [row for unit in units for row in unit.finished]
    kinds = {row.on_gpu for row in finished if row.peak_memory_gib is not None}
    places = {
        (row.result.provenance.device, row.result.provenance.num_workers, row.result.provenance.gpus_per_worker)
        for row in finished
        if row.result.usage.train_s
    }
    return Costs(
        memory_gib=tuple(_over_seeds(unit, lambda row: _memory(row, known), max) for unit in units),
        time_s=tuple(_over_seeds(unit, lambda row: _time(row, known), fmean) for unit in units),
        memory_problem="some peaks are of a GPU and some of a process" if len(kinds) > 1 else None,
        time_problem="the trials ran on different devices or numbers of workers" if len(places) > 1 else None,
    )


def _over_seeds(
    unit: SeedGroup, read: Callable[[Row], float | None], fold: Callable[[list[float]], float]
) -> float | None:
    values = [value for row in unit.finished if (value := read(row)) is not None]
    return fold(values) if values else None


def _memory(row: Row, known: Mapping[str, Row]) -> float | None:
    own = row.peak_memory_gib
    if not row.result.members:
        return own
    peaks = _of_members(row, known, lambda member: member.peak_memory_gib)
    return None if peaks is None else max([*peaks, own or 0.0])


def _time(row: Row, known: Mapping[str, Row]) -> float | None:
    own = row.seconds("train_s")
    if not row.result.members:
        return own
    times = _of_members(row, known, lambda member: member.seconds("train_s"))
    return None if times is None else sum(times) + (own or 0.0)


def _of_members(row: Row, known: Mapping[str, Row], read: Callable[[Row], float | None]) -> list[float] | None:
    """A value of every member; None if one is unknown."""
    found = [read(known[member]) if member in known else None for member in row.result.members]
    values = [value for value in found if value is not None]
    return values if len(values) == len(found) else None
