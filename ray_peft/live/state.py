"""What the live page shows of a sweep, read from its folder alone: losses, memory, and who ran where and when."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray_peft.foundation.json_lines import GrowingFile
from ray_peft.report.curves import thinned
from ray_peft.report.timeline import Span, Stay, lanes_of
from ray_peft.store.progress import DRIVEN, Progress, Reader, TrialProgress

MOST_POINTS = 150
"""Points of a curve that are sent, evenly spread where there are more."""
CURVES = ("train_loss", "eval_loss")


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

    def _curves_of(self, trial: TrialProgress) -> dict[str, tuple[tuple[int, float], ...]]:
        path = self._folder / "trials" / trial.trial_id / "metrics.jsonl"
        return self._curves.setdefault(trial.trial_id, Curves(path)).read()


class Curves:
    """The losses of one trial, of which only what is new is read."""

    def __init__(self, path: Path) -> None:
        self._log = GrowingFile(path)
        self._points: dict[str, list[tuple[int, float]]] = {name: [] for name in CURVES}

    def read(self) -> dict[str, tuple[tuple[int, float], ...]]:
        """Step and loss of the points so far, by the kind of loss."""
        with contextlib.suppress(OSError):
            lines, began_again = self._log.new_lines()
            if began_again:
                self._points = {name: [] for name in CURVES}
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    self._take(json.loads(line))
        return {name: thinned(tuple(points), MOST_POINTS) for name, points in self._points.items()}

    def _take(self, point: dict[str, Any]) -> None:
        for name in CURVES:
            if isinstance(point.get(name), int | float):
                self._points[name].append((int(point["step"]), float(point[name])))


def _timeline(progress: Progress, now: float) -> dict[str, Any]:
    """The lanes of GPUs with the trials on them and the gaps between, as JSON-like data."""
    begun = [(trial, trial.began) for trial in progress.trials if trial.began is not None and trial.state != "silent"]
    ends = {trial.trial_id: trial.ended if trial.ended is not None else now for trial, _ in begun}
    lanes = lanes_of(
        [Stay(trial=trial, place=trial.place, start=began, end=ends[trial.trial_id]) for trial, began in begun]
    )
    if not lanes:
        return {"lanes": [], "end_s": 0.0}
    end_s = max(span.end_s for lane in lanes for span in lane.spans)
    if progress.driver in DRIVEN:  # what is idle now is a gap as well
        end_s += max(0.0, now - max(ends.values()))
    return {
        "lanes": [
            {"name": lane.name, "spans": [_plain(span) for span in lane.spans], "gaps": lane.gaps(end_s)}
            for lane in lanes
        ],
        "end_s": end_s,
    }


def _plain(span: Span[TrialProgress]) -> dict[str, Any]:
    trial = span.trial
    return {
        "trial": trial.trial_id,
        "method": trial.method,
        "state": trial.state,
        "start_s": span.start_s,
        "end_s": span.end_s,
    }
