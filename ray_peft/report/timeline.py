"""When each trial ran, on which GPU, and how long that GPU had nothing to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

from ray_peft.report.table import Row
from ray_peft.store.progress import place_name

TrialT = TypeVar("TrialT")
"""What is known of a trial: its row, or how far it is."""


@dataclass(frozen=True, kw_only=True)
class Stay(Generic[TrialT]):
    """Where and when a trial ran, or runs."""

    trial: TrialT
    place: str
    """The GPU, or CPU."""
    start: float
    """Unix time [s]."""
    end: float


@dataclass(frozen=True, kw_only=True)
class Span(Generic[TrialT]):
    """One trial on its lane."""

    trial: TrialT
    start_s: float
    """Since the first trial began."""
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Lane(Generic[TrialT]):
    """One GPU, or one place of several on a shared GPU or on the CPU, with the trials that ran there one by one."""

    name: str
    spans: tuple[Span[TrialT], ...]

    @property
    def busy_s(self) -> float:
        """Seconds with a trial."""
        return sum(span.end_s - span.start_s for span in self.spans)

    def gaps(self, end_s: float) -> list[tuple[float, float]]:
        """Start and end of the times without a trial, from the first trial of the sweep to `end_s`, its end."""
        gaps, at = [], 0.0
        for span in self.spans:
            if span.start_s > at + _SLACK_S:
                gaps.append((at, span.start_s))
            at = max(at, span.end_s)
        return [*gaps, (at, end_s)] if end_s > at + _SLACK_S else gaps


def lanes(rows: Sequence[Row]) -> list[Lane[Row]]:
    """The lanes of all trials that say when they started.

    A row of an earlier version does not say when it ended nor on which GPU it ran: it then ended when its seconds were
    over, and the GPUs of its machine are told apart by what overlapped.
    """
    return lanes_of([stay for row in rows if (stay := _stay(row)) is not None])


def lanes_of(stays: Sequence[Stay[TrialT]]) -> list[Lane[TrialT]]:
    """The lanes of trials, by name; trials that overlap on one device get a lane each.

    Times when the whole sweep was stopped are left out.
    """
    ordered = sorted(stays, key=lambda stay: (stay.start, stay.end))
    places: dict[str, list[list[Span[TrialT]]]] = {}
    for stay, zero in zip(ordered, _without_stops(ordered), strict=True):
        span = Span(trial=stay.trial, start_s=stay.start - zero, end_s=max(stay.start, stay.end) - zero)
        of_device = places.setdefault(stay.place, [])
        free = next((spans for spans in of_device if spans[-1].end_s <= span.start_s + _SLACK_S), None)
        if free is None:
            of_device.append([span])
        else:
            free.append(span)
    return [
        Lane(name=device if len(of_device) == 1 else f"{device}, place {number}", spans=tuple(spans))
        for device, of_device in sorted(places.items())
        for number, spans in enumerate(of_device, 1)
    ]


_SLACK_S = 1.0
"""Starts are told in whole seconds."""
STOPPED_S = 600.0
"""Where no trial ran anywhere for longer, the sweep was stopped and went on later."""


def _without_stops(stays: Sequence[Stay[TrialT]]) -> list[float]:
    """For each trial, by ascending start, the Unix time [s] that its seconds count from: a stop takes no time."""
    if not stays:
        return []
    zeros = []
    zero = busy_until = stays[0].start
    for stay in stays:
        idle = stay.start - busy_until
        if idle > STOPPED_S:
            zero += idle
        busy_until = max(busy_until, stay.end)
        zeros.append(zero)
    return zeros


def _stay(row: Row) -> Stay[Row] | None:
    provenance = row.result.provenance
    if not provenance.started_at or row.result.members:
        return None
    start = datetime.fromisoformat(provenance.started_at).timestamp()
    ended_at = provenance.ended_at
    end = datetime.fromisoformat(ended_at).timestamp() if ended_at else start + row.result.usage.wall_time_s
    place = place_name(provenance.gpu, provenance.hostname, on_gpu=row.on_gpu)
    return Stay(trial=row, place=place, start=start, end=end)
