"""What a trial has logged, over all its attempts: in metrics.jsonl and with the tracker, each point once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray_peft.foundation.measured import to_json
from ray_peft.foundation.whole import write_text


class MetricLog:
    """The logged points of a trial. Checkpoints store them, since metrics.jsonl may have steps after a checkpoint."""

    def __init__(self, path: Path, track: Callable[[Mapping[str, float], int], None]) -> None:
        """Begin an empty log.

        Args:
            path: of metrics.jsonl. The first point of an attempt that goes on from nothing replaces it.
            track: passes points to the tracker, which has none of them yet.
        """
        self._path, self._track = path, track
        self._points: list[tuple[int, float, dict[str, float]]] = []
        """Step, seconds since the trial's first start, metrics."""
        self._tracked: set[tuple[int, str]] = set()
        self._begun = False

    def add(self, metrics: Mapping[str, float], step: int, time_s: float) -> None:
        """Log metrics of an optimizer step, `time_s` seconds after the trial's first start."""
        point = (step, round(time_s, 3), {name: float(value) for name, value in metrics.items()})
        self._points.append(point)
        with self._path.open("a" if self._begun else "w", encoding="utf-8") as file:
            file.write(_line(*point))
        self._begun = True
        self._pass_on(step, metrics)

    def so_far(self) -> list[Any]:
        """All points, as JSON-like data."""
        return [list(point) for point in self._points]

    def restore(self, points: list[Any] | None) -> None:
        """Go on after a checkpoint's points, in place of what was logged before.

        Args:
            points: what `so_far` returned; None for a checkpoint of version 0.1.0, after which metrics.jsonl is
                continued as it is.
        """
        self._begun = True
        if points is None:
            return
        self._points = [(int(step), float(time_s), dict(metrics)) for step, time_s, metrics in points]
        write_text(self._path, "".join(_line(*point) for point in self._points))
        for step, _, metrics in self._points:
            self._pass_on(step, metrics)

    def begin_again(self) -> None:
        """Forget the points, but not which of them the tracker has: the trial starts over."""
        self._points, self._begun = [], False

    def _pass_on(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass to the tracker the metrics that it does not have."""
        if new := {name: value for name, value in metrics.items() if (step, name) not in self._tracked}:
            self._tracked |= {(step, name) for name in new}
            self._track(new, step)


def _line(step: int, time_s: float, metrics: Mapping[str, float]) -> str:
    return json.dumps(to_json({"step": step, "time_s": time_s, **metrics})) + "\n"
