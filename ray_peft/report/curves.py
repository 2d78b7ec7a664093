"""metrics.jsonl -> the losses of a trial over its steps."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias, TypeVar

from ray_peft.foundation.measured import from_json

logger = logging.getLogger(__name__)

PointT = TypeVar("PointT")
Points: TypeAlias = tuple[tuple[int, float], ...]
"""Step and loss, by ascending step."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a trial logged."""

    train: Points = ()
    """Training loss: the mean over the steps since the point before."""
    held_out: Points = ()
    """Loss on the held-out rows."""
    boundaries: tuple[int, ...] = ()
    """Steps after which another stage began."""


def read_curve(path: Path) -> Curve:
    """The losses in a trial's metrics.jsonl; an empty curve if there is no such file.

    A line that is no JSON object with a step is passed over with a warning: a trial that was killed while it wrote
    and went on later leaves one in the middle.
    """
    if not path.is_file():
        return Curve()
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            logged = json.loads(line)
        except ValueError:  # JSONDecodeError and UnicodeDecodeError
            logged = None
        if isinstance(logged, dict) and isinstance(logged.get("step"), int):
            lines.append(logged)
        else:
            logger.warning("%s: line %d is no logged step and was passed over", path, number)
    return curve(lines)


def curve(lines: Iterable[Mapping[str, Any]]) -> Curve:
    """The losses of logged lines; of a step logged twice, as by a trial that went on from a checkpoint, the later."""
    train: dict[int, float] = {}
    held_out: dict[int, float] = {}
    boundaries: set[int] = set()
    for line in lines:
        step = line["step"]
        for name, into in (("train_loss", train), ("eval_loss", held_out)):
            if isinstance(value := from_json(line.get(name)), int | float):
                into[step] = float(value)
        if any(name.startswith("boundary_loss.") for name in line):
            boundaries.add(step)
    return Curve(
        train=tuple(sorted(train.items())),
        held_out=tuple(sorted(held_out.items())),
        boundaries=tuple(sorted(boundaries)),
    )


def finite(points: Points) -> Points:
    """The points that can be drawn."""
    return tuple((step, loss) for step, loss in points if math.isfinite(loss))


def mean_points(several: Sequence[Points]) -> Points:
    """The mean at every step that all of them logged."""
    if not several:
        return ()
    by_step = [dict(points) for points in several]
    shared = sorted(set(by_step[0]).intersection(*by_step))
    return tuple((step, fmean(losses[step] for losses in by_step)) for step in shared)


def extreme_points(several: Sequence[Points]) -> tuple[tuple[int, float, float], ...]:
    """Step, least and greatest value at every step that all of them logged."""
    if not several:
        return ()
    by_step = [dict(points) for points in several]
    shared = sorted(set(by_step[0]).intersection(*by_step))
    values = [[losses[step] for losses in by_step] for step in shared]
    return tuple((step, min(of_step), max(of_step)) for step, of_step in zip(shared, values, strict=True))


def thinned(points: tuple[PointT, ...], most: int = 400) -> tuple[PointT, ...]:
    """At most about `most` points, evenly spread, the first and the last among them."""
    if len(points) <= most:
        return points
    return tuple(points[round(index * (len(points) - 1) / (most - 1))] for index in range(most))
