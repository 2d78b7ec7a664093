"""Rows of a step laid into few static shapes: several rows a lane, one after the other, few lanes a pass. Pure.

A recorded pass replays one shape, so every step's rows must come in few of them; and padding costs time on a GPU that
waits for nothing. A bucket is `lanes` times `capacity` tokens; a row lies whole in one lane, and attention stays
inside the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CAPACITIES = tuple(sorted({64 << step for step in range(16)} | {96 << step for step in range(15)}))
"""Tokens of a lane: powers of two, and one and a half times them."""
LANES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True)
class Bucket:
    """A static shape."""

    lanes: int
    capacity: int
    """Tokens of each lane."""

    @property
    def tokens(self) -> int:
        """Tokens of a pass, empty places included."""
        return self.lanes * self.capacity


@dataclass(frozen=True)
class Pass:
    """Which rows a pass holds, and where."""

    bucket: Bucket
    lanes: tuple[tuple[int, ...], ...]
    """The rows of each lane that has any, in order, by their place in the step."""


def capacity_for(tokens: int) -> int:
    """The least capacity that holds so many tokens."""
    return next((capacity for capacity in CAPACITIES if capacity >= tokens), tokens)


def lay_out(lengths: Sequence[int], tokens: int) -> list[Pass]:
    """Few passes of little padding for the rows of a step.

    Of the capacities that hold the longest row, the one that leaves the fewest tokens to pass is taken, of equal ones
    the largest. Rows are laid first fit, the longest first.

    Args:
        lengths: tokens of each row.
        tokens: most tokens of a pass; one that a single row exceeds passes that row alone.
    """
    if not lengths:
        return []
    longest = capacity_for(max(lengths))
    options = [capacity for capacity in CAPACITIES if longest <= capacity <= max(longest, tokens)] or [longest]
    plans = [_passes(_filled(lengths, capacity), capacity, tokens) for capacity in options]
    return min(plans, key=lambda plan: (sum(part.bucket.tokens for part in plan), len(plan), -plan[0].bucket.capacity))


def _filled(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Lanes of rows, first fit, the longest row first."""
    lanes: list[list[int]] = []
    left: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = next((lane for lane, free in enumerate(left) if free >= lengths[row]), None)
        if place is None:
            lanes.append([])
            left.append(capacity)
            place = len(lanes) - 1
        lanes[place].append(row)
        left[place] -= lengths[row]
    return lanes


def _passes(lanes: list[list[int]], capacity: int, tokens: int) -> list[Pass]:
    most = max((count for count in LANES if count * capacity <= tokens), default=1)
    passes = []
    for first in range(0, len(lanes), most):
        part = lanes[first : first + most]
        bucket = Bucket(next(count for count in LANES if count >= len(part)), capacity)
        passes.append(Pass(bucket, tuple(tuple(rows) for rows in part)))
    return passes
