"""When each trial ran, on which GPU, and how long that GPU had nothing to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from ray_peft.report.table import Row


@dataclass(frozen=True, kw_only=True)
class Span:
    """One trial on its lane."""

    row: Row
    start_s: float
    """Since the first trial began."""
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One GPU, or one place of several on a shared GPU or on the CPU, with the trials that ran there one by one."""

    name: str
    spans: tuple[Span, ...]

    @property
    def busy_s(self) -> float:
        """Seconds with a trial."""
        return sum(span.end_s - span.start_s for span in self.spans)

    def gaps(self, end_s: float) -> list[tuple[float, float]]:
        """Start and end of the times without a trial, from the first trial of the sweep to `end_s`, its end."""
        gaps, at = [], 0.0
        for span in self.spans:
            if span.start_s > at:
                gaps.append((at, span.start_s))
            at = max(at, span.end_s)
        return [*gaps, (at, end_s)] if end_s > at else gaps


def lanes(rows: Sequence[Row]) -> list[Lane]:
    """The lanes of all trials that say when they started; trials that overlap on one device get a lane each.

    Times when the whole sweep was stopped are left out. A row of an earlier version does not say when it ended nor on
    which GPU it ran: it then ended when its seconds were over, and the GPUs of its machine are told apart by what
    overlapped.
    """
    timed = [(row, *moments) for row in rows if (moments := _moments(row)) is not None]
    if not timed:
        return []
    timed.sort(key=lambda entry: entry[1:])
    shifts = without_stops([(start, end) for _, start, end in timed])
    free: dict[str, list[list[Span]]] = {}
    for (row, start, end), first in zip(timed, shifts, strict=True):
        span = Span(row=row, start_s=(start - first).total_seconds(), end_s=(end - first).total_seconds())
        device = _device(row)
        places = free.setdefault(device, [])
        place = next((place for place in places if place[-1].end_s <= span.start_s + _SLACK_S), None)
        if place is None:
            places.append([span])
        else:
            place.append(span)
    return [
        Lane(name=device if len(places) == 1 else f"{device}, place {number}", spans=tuple(place))
        for device, places in sorted(free.items())
        for number, place in enumerate(places, 1)
    ]


_SLACK_S = 1.0
"""Starts are told in whole seconds."""
STOPPED_S = 600.0
"""Where no trial ran anywhere for longer, the sweep was stopped and went on later."""


def without_stops(moments: Sequence[tuple[datetime, datetime]]) -> list[datetime]:
    """For each trial, by ascending start, the moment that its seconds count from: stops of the sweep take no time."""
    shifts = []
    zero = busy_until = moments[0][0]
    for start, end in moments:
        idle = start - busy_until
        if idle.total_seconds() > STOPPED_S:
            zero += idle
        busy_until = max(busy_until, end)
        shifts.append(zero)
    return shifts


def _moments(row: Row) -> tuple[datetime, datetime] | None:
    provenance = row.result.provenance
    if not provenance.started_at or row.result.members:
        return None
    start = datetime.fromisoformat(provenance.started_at)
    if provenance.ended_at:
        return start, datetime.fromisoformat(provenance.ended_at)
    return start, start + timedelta(seconds=row.result.usage.wall_time_s)


def _device(row: Row) -> str:
    provenance = row.result.provenance
    if provenance.gpu:
        return f"{provenance.hostname} GPU {provenance.gpu}".strip()
    return f"{provenance.hostname} {'GPU' if row.on_gpu else 'CPU'}".strip()
