"""Packs the rows of a step into few static shapes: a lane holds several rows, a pass several lanes. Pure.

A recorded pass replays one shape, so the rows of all steps must fit few shapes, and padding costs time. A bucket is
`lanes` times `capacity` tokens. A row lies in one lane as a whole, and attention stays inside the row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

CAPACITIES = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
"""Tokens of a lane. They are few, since every shape is recorded once, which takes as long as a few steps."""
WASTE = 1.5
PASS = 700
"""Fixed time of a recorded pass, in tokens that take as long: for Gemma-3-1B on an H200, 18 ms at 0.026 ms a token."""
LANES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True)
class Bucket:
    """A static shape."""

    lanes: int
    capacity: int
    """Tokens of each lane."""

    @property
    def tokens(self) -> int:
        """Tokens of a pass, with empty places."""
        return self.lanes * self.capacity

    def scored_places(self, share: float, scored: int) -> int:
        """The places that are scored: this share of them, or all if more than the share are `scored`."""
        places = int(self.tokens * share)
        return places if scored <= places else self.tokens


@dataclass(frozen=True)
class Pass:
    """Which rows a pass holds, and where."""

    bucket: Bucket
    lanes: tuple[tuple[int, ...], ...]
    """The rows of each lane that is not empty, in order, as indices into the rows of the step."""


def scored_share(scored: int, tokens: int) -> float:
    """The share of tokens that are scored, and a quarter of it more, rounded up to 0.25, 0.5, 0.75 or 1."""
    return min(1.0, math.ceil(scored / max(tokens, 1) * 1.25 * 4) / 4)


def largest_capacity(tokens: int) -> int:
    """The capacity for rows of up to `tokens` tokens: hardly more, since memory is predicted for the longest row."""
    return -(-tokens // 64) * 64


def lay_out(lengths: Sequence[int], tokens: int, largest: int, members: Sequence[int] | None = None) -> list[Pass]:
    """Pack the rows of a step into few passes with little padding.

    Of the capacities that hold the longest row, it chooses the one with the fewest tokens in all passes, and of several
    with as few the one with the fewest passes, then the largest. Rows are placed first fit, the longest first.

    Args:
        lengths: tokens of each row.
        tokens: most tokens of a pass; one that a single row exceeds passes that row alone.
        largest: the capacity that holds every row of the trial.
        members: the member of each row, since a lane holds rows of one member; None for a single member.
    """
    if not lengths:
        return []
    owners = members if members is not None else [0] * len(lengths)
    options = [capacity for capacity in CAPACITIES if max(lengths) <= capacity < largest] + [largest]
    plans = [_passes(_filled(lengths, owners, capacity), capacity, tokens) for capacity in options]
    return min(plans, key=lambda plan: (sum(part.bucket.tokens for part in plan), len(plan), -plan[0].bucket.capacity))


def lay_out_apart(lengths: Sequence[int], tokens: int, largest: int, members: Sequence[int]) -> list[Pass]:
    """As `lay_out`, with separate passes for short rows if these cost less than the padding that they save.

    A lane holds rows of one member. With many members of one row each, all lanes would be as long as the longest row.

    Args:
        lengths: tokens of each row.
        tokens: most tokens of a pass; one that a single row exceeds passes that row alone.
        largest: the capacity that holds every row.
        members: the member of each row.
    """
    kinds: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        capacity = min((size for size in CAPACITIES if lengths[row] <= size < largest), default=largest)
        kinds.setdefault(capacity, []).append(row)
    rows_by_kind = list(kinds.values())
    # plans[n]: cost and passes of the cheapest way to pass the rows of the n largest kinds
    plans: list[tuple[int, list[Pass]]] = [(0, [])]
    for last in range(1, len(rows_by_kind) + 1):
        options = []
        for first in range(last):
            rows = [row for kind in rows_by_kind[first:last] for row in kind]
            packed = lay_out([lengths[row] for row in rows], tokens, largest, [members[row] for row in rows])
            passes = [
                replace(part, lanes=tuple(tuple(rows[row] for row in lane) for lane in part.lanes)) for part in packed
            ]
            earlier_cost, earlier_passes = plans[first]
            cost = earlier_cost + sum(part.bucket.tokens + PASS for part in passes)
            options.append((cost, earlier_passes + passes))
        plans.append(min(options, key=lambda option: option[0]))
    return plans[-1][1]


def reused(part: Pass, used: set[Bucket], tokens: int) -> Pass:
    """The pass in a shape that was used before, if one is at most 1.5 times as large; else in its own shape.

    Args:
        part: a pass.
        used: the shapes so far; a new one is added to them.
        tokens: most tokens of a pass.
    """
    fitting = [
        bucket
        for bucket in used
        if bucket.lanes >= len(part.lanes)
        and bucket.capacity >= part.bucket.capacity
        and bucket.tokens <= min(tokens, part.bucket.tokens * WASTE)
    ]
    if not fitting:
        used.add(part.bucket)
        return part
    return replace(part, bucket=min(fitting, key=lambda bucket: (bucket.tokens, bucket.capacity)))


def _filled(lengths: Sequence[int], owners: Sequence[int], capacity: int) -> list[list[int]]:
    """Lanes with the rows of one owner each, placed first fit, the longest row first."""
    lanes: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        free = (lane for lane, tokens in enumerate(room) if tokens >= lengths[row])
        place = next((lane for lane in free if owners[lanes[lane][0]] == owners[row]), None)
        if place is None:
            lanes.append([])
            room.append(capacity)
            place = len(lanes) - 1
        lanes[place].append(row)
        room[place] -= lengths[row]
    return lanes


def _passes(lanes: list[list[int]], capacity: int, tokens: int) -> list[Pass]:
    most = max((count for count in LANES if count * capacity <= tokens), default=1)
    passes = []
    for first in range(0, len(lanes), most):
        part = lanes[first : first + most]
        bucket = Bucket(next(count for count in LANES if count >= len(part)), capacity)
        passes.append(Pass(bucket, tuple(tuple(rows) for rows in part)))
    return passes
