"""What the live page shows of a sweep, read from its folder alone: losses, memory, and who ran where and when."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray_peft.foundation.json_lines import added_lines
from ray_peft.report.timeline import without_stops
from ray_peft.store.progress import DRIVEN, Progress, Reader, TrialProgress

MOST_POINTS = 150
"""Points of a curve that are sent; of more, every second or third."""
CURVES = ("train_loss", "eval_loss")
_SLACK_S = 1.0
"""Starts in rows are whole seconds."""


class State:
    """Reads a sweep's folder again and again."""

    def __init__(self, folder: Path) -> None:
        """Prepare to read.

        Raises:
            DataError: the folder is not one of a sweep.
        """
        self._folder = folder
        self._reader = Reader(folder)
        self._curves: dict[str, Curves] = {}

    def plain(self) -> dict[str, Any]:
        """All that the page shows, as JSON-like data; seconds count from the start of the first trial."""
        progress = self._reader.read()
        now = time.time()
        return {
            "name": progress.name,
            "driver": progress.driver,
            "trials": [{**asdict(trial), **self._curves_of(trial)} for trial in progress.trials],
            **_timeline(progress, now),
        }

    def _curves_of(self, trial: TrialProgress) -> dict[str, list[tuple[int, float]]]:
        path = self._folder / "trials" / trial.trial_id / "metrics.jsonl"
        return self._curves.setdefault(trial.trial_id, Curves(path)).read()


class Curves:
    """The losses of one trial, of which only what is new is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read, self._file = 0, 0
        self._points: dict[str, list[tuple[int, float]]] = {name: [] for name in CURVES}

    def read(self) -> dict[str, list[tuple[int, float]]]:
        """Step and loss of the points so far, by the kind of loss."""
        with contextlib.suppress(OSError):
            status = self._path.stat()
            if status.st_ino != self._file or status.st_size < self._read:  # the trial has begun again
                self._read, self._file = 0, status.st_ino
                self._points = {name: [] for name in CURVES}
            lines, self._read = added_lines(self._path, self._read)
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    self._take(json.loads(line))
        return {name: _thinned(points) for name, points in self._points.items()}

    def _take(self, point: dict[str, Any]) -> None:
        for name in CURVES:
            if isinstance(point.get(name), int | float):
                self._points[name].append((int(point["step"]), float(point[name])))


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most so many points, the newest among them."""
    return points[:: -max(1, -(-len(points) // MOST_POINTS))][::-1]


def _timeline(progress: Progress, now: float) -> dict[str, Any]:
    """The lanes of GPUs with the trials on them and the gaps between; trials that overlap on one get a lane each."""
    spans = _spans(progress.trials, now)
    if not spans:
        return {"lanes": [], "end_s": 0.0}
    lanes: dict[str, list[list[dict[str, Any]]]] = {}
    for place, span in spans:
        rows = lanes.setdefault(place, [])
        row = next((row for row in rows if row[-1]["end_s"] <= span["start_s"] + _SLACK_S), None)
        if row is None:
            rows.append([span])
        else:
            row.append(span)
    end_s = max(span["end_s"] for _, span in spans)
    if progress.driver in DRIVEN:  # what is idle now is a gap as well
        end_s += max(0.0, now - max(trial.ended or now for trial in progress.trials if trial.began is not None))
    named = [
        {"name": place if len(rows) == 1 else f"{place}, place {number}", "spans": row, "gaps": _gaps(row, end_s)}
        for place, rows in sorted(lanes.items())
        for number, row in enumerate(rows, 1)
    ]
    return {"lanes": named, "end_s": end_s}


def _spans(trials: Sequence[TrialProgress], now: float) -> list[tuple[str, dict[str, Any]]]:
    """Where and when trials run or ran, by their start; times at which the whole sweep was stopped are left out."""
    timed = [
        (trial.began, trial.ended if trial.ended is not None else now, trial)
        for trial in trials
        if trial.began is not None and trial.state != "silent"
    ]
    if not timed:
        return []
    timed.sort(key=lambda entry: entry[:2])
    moments = [(datetime.fromtimestamp(start, UTC), datetime.fromtimestamp(end, UTC)) for start, end, _ in timed]
    return [
        (
            trial.place,
            {
                "trial": trial.trial_id,
                "method": trial.method,
                "state": trial.state,
                "start_s": start - zero.timestamp(),
                "end_s": max(start, end) - zero.timestamp(),
            },
        )
        for (start, end, trial), zero in zip(timed, without_stops(moments), strict=True)
    ]


def _gaps(spans: Sequence[dict[str, Any]], end_s: float) -> list[tuple[float, float]]:
    """Start and end of the times without a trial."""
    gaps, at = [], 0.0
    for span in spans:
        if span["start_s"] > at + _SLACK_S:
            gaps.append((at, span["start_s"]))
        at = max(at, span["end_s"])
    return [*gaps, (at, end_s)] if end_s > at + _SLACK_S else gaps
