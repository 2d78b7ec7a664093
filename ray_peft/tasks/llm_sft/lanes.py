"""Rows of a step laid into few static shapes: several rows a lane, one after the other, few lanes a pass. Pure.

A recorded pass replays one shape, so every step's rows must come in few of them; and padding costs time on a GPU that
waits for nothing. A bucket is `lanes` times `capacity` tokens; a row lies whole in one lane, and attention stays
inside the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

CAPACITIES = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
"""Tokens of a lane; few, since each shape is recorded once, which costs what some steps do."""
WASTE = 1.5
PASS = 700
"""What a recorded pass costs by itself, in tokens: of Gemma-3-1B on an H200, 18 ms and 0.026 ms a token."""
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


def largest_capacity(tokens: int) -> int:
    """The capacity for rows of up to so many tokens: little more, since memory is predicted for them."""
    return -(-tokens // 64) * 64


def lay_out(lengths: Sequence[int], tokens: int, largest: int, members: Sequence[int] | None = None) -> list[Pass]:
    """Few passes of little padding for the rows of a step.

    Of the capacities that hold the longest row, the one that leaves the fewest tokens to pass is taken, of equal ones
    the largest. Rows are laid first fit, the longest first.

    Args:
        lengths: tokens of each row.
        tokens: most tokens of a pass; one that a single row exceeds passes that row alone.
        largest: the capacity that holds every row of the trial.
        members: whose each row is: no lane holds rows of several members; None for a single one.
    """
    if not lengths:
        return []
    owners = members if members is not None else [0] * len(lengths)
    options = [capacity for capacity in CAPACITIES if max(lengths) <= capacity < largest] + [largest]
    plans = [_passes(_filled(lengths, owners, capacity), capacity, tokens) for capacity in options]
    return min(plans, key=lambda plan: (sum(part.bucket.tokens for part in plan), len(plan), -plan[0].bucket.capacity))


def lay_out_apart(lengths: Sequence[int], tokens: int, largest: int, members: Sequence[int]) -> list[Pass]:
    """As `lay_out`, with short rows in passes of their own where that costs less than the lanes that they leave empty.

    A lane holds rows of one member: of many members with a row each, all lanes would be as long as the longest row.

    Args:
        lengths: tokens of each row.
        tokens: most tokens of a pass; one that a single row exceeds passes that row alone.
        largest: the capacity that holds every row.
        members: whose each row is.
    """
    kinds: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        capacity = min((size for size in CAPACITIES if lengths[row] <= size < largest), default=largest)
        kinds.setdefault(capacity, []).append(row)
    sorted_rows = list(kinds.values())
    # plans[n]: the cheapest way to pass the rows of the n largest kinds
    plans: list[tuple[int, list[Pass]]] = [(0, [])]
    for last in range(1, len(sorted_rows) + 1):
        options = []
        for first in range(last):
            rows = [row for kind in sorted_rows[first:last] for row in kind]
            laid = lay_out([lengths[row] for row in rows], tokens, largest, [members[row] for row in rows])
            passes = [
                replace(part, lanes=tuple(tuple(rows[row] for row in lane) for lane in part.lanes)) for part in laid
            ]
            before, earlier = plans[first]
            options.append((before + sum(part.bucket.tokens + PASS for part in passes), earlier + passes))
        plans.append(min(options, key=lambda option: option[0]))
    return plans[-1][1]


def reused(part: Pass, used: set[Bucket], tokens: int) -> Pass:
    """The pass in a shape that was used before, if one is at most half as large again; else its own, used from now on.

    Args:
        part: a pass.
        used: shapes, which its own is added to if none serves.
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
    """Lanes of rows of one owner, first fit, the longest row first."""
    lanes: list[list[int]] = []
    left: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        free = (lane for lane, room in enumerate(left) if room >= lengths[row])
        place = next((lane for lane in free if owners[lanes[lane][0]] == owners[row]), None)
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
