"""How many rates, steps, rows and seeds fit into a time: arithmetic only.

A comparison has up to three rungs. *Search* tries rates of every method in short trials, and *longer* the best of them
in trials of twice the steps, both on validation rows. *Answer* trains every method at its chosen rate with new seeds,
and the test rows are scored for the first time. Halving is inside a method and never between methods: each has equally
many trials of equally many steps. (Successive halving: Jamieson and Talwalkar 2016, arXiv:1502.07943.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

Seconds: TypeAlias = Callable[[str, int, int, int], float]
"""Seconds of a trial, from method, steps, scored rows and answered rows; linear in the steps."""

BASE = "none"


@dataclass(frozen=True)
class Shape:
    """How a comparison is divided."""

    rates: int
    """Rates tried of each method."""
    longer: int
    """The best of them that are tried again in longer trials; 0 skips that rung."""
    seeds: int
    """Trials of each method's chosen rate."""
    enough_steps: int
    """Steps of the answer's trials from which on this shape is taken rather than a smaller one."""

    @property
    def search_share(self) -> float:
        """Steps of a trial of the search, as a share of those of the answer."""
        return 1 / 4 if self.longer else 1 / 2

    def steps(self, answer: int) -> tuple[int, int, int]:
        """Steps of a trial in each rung; 0 where there is no such rung."""
        search = max(1, math.ceil(self.search_share * answer))
        return search, math.ceil(answer / 2) if self.longer else 0, answer


SHAPES = (Shape(7, 3, 3, 400), Shape(5, 2, 3, 200), Shape(5, 2, 2, 100), Shape(3, 0, 2, 40), Shape(3, 0, 1, 6))
"""From the largest to the smallest; the last is the least that compares tuned methods."""

SCORING_SHARE = 0.3
"""Of the time that loading and the fewest rows leave, what scoring more rows may take."""

FEWEST_ROWS = 16
"""Validation rows, and test rows, at least."""

SAFETY = 0.9
"""Of the time, what is planned for."""


@dataclass(frozen=True)
class Limits:
    """What bounds a plan beside the time."""

    steps: int
    """Most steps of a trial: three epochs."""
    validation_rows: int
    test_rows: int
    answers: bool
    """Whether the test rows are answered."""
    general_rows: int = 0
    """Rows like these that a general text would make, whose loss is taken beside that of the test rows."""


@dataclass(frozen=True)
class Plan:
    """What is run."""

    rates: int
    longer: int
    seeds: int
    search_steps: int
    longer_steps: int
    answer_steps: int
    validation_rows: int
    test_rows: int
    search_s: float
    """Predicted seconds of a rung, all of its trials one after the other, with what a sweep takes beside them."""
    longer_s: float
    answer_s: float
    answer_step_s: float
    """What one step more or less changes in `answer_s`."""

    @property
    def whole_s(self) -> float:
        """Seconds of all rungs."""
        return self.search_s + self.longer_s + self.answer_s


class TooShort(Exception):
    """Not even the smallest comparison fits; carries the seconds that it needs."""

    def __init__(self, least_s: float) -> None:
        super().__init__(f"needs {least_s:.0f} s")
        self.least_s = least_s


def plan(methods: Sequence[str], seconds: Seconds, time_s: float, limits: Limits, overhead_s: float) -> Plan:
    """The largest comparison that is predicted to end within a time.

    Args:
        methods: that are compared; the untouched base is scored beside them.
        seconds: of a trial.
        time_s: that is there.
        limits: of steps and rows.
        overhead_s: of a sweep, beside its trials.

    Raises:
        TooShort: there is none.
    """
    planned = partial(_planned, methods=methods, seconds=seconds, limits=limits, overhead_s=overhead_s)
    for shape in SHAPES:
        for rows in _fewer_rows(limits):
            least_s = planned(shape, 0, _fewest(limits)).whole_s
            if planned(shape, 0, rows).whole_s - least_s > SCORING_SHARE * max(0.0, SAFETY * time_s - least_s):
                continue
            steps = _most_steps(partial(planned, shape, rows=rows), SAFETY * time_s, limits.steps)
            if steps >= min(shape.enough_steps, limits.steps):
                return planned(shape, steps, rows)
            if shape is not SHAPES[-1]:  # the smallest gives up rows before it gives up
                break
    least = SHAPES[-1]
    needed = planned(least, least.enough_steps, _fewest(limits))
    raise TooShort(needed.whole_s / SAFETY)


def _most_steps(planned: Callable[[int], Plan], time_s: float, most: int) -> int:
    """Steps of the answer's trials that fit into a time, `most` at most; 0 if none does."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if planned(middle).whole_s <= time_s else (low, middle)
    return low


def _planned(
    shape: Shape,
    answer_steps: int,
    rows: tuple[int, int],
    *,
    methods: Sequence[str],
    seconds: Seconds,
    limits: Limits,
    overhead_s: float,
) -> Plan:
    search, longer, answer = shape.steps(answer_steps) if answer_steps else (0, 0, 0)
    validation, test = rows
    answered, scored = test if limits.answers else 0, test + limits.general_rows

    def rung(trials: int, steps: int, rows: int, answers: int) -> float:
        return trials * sum(seconds(method, steps, rows, answers) for method in methods)

    search_s = rung(shape.rates, search, validation, 0) + overhead_s
    longer_s = rung(shape.longer, longer, validation, 0) + overhead_s if shape.longer else 0.0
    answer_s = rung(shape.seeds, answer, scored, answered) + seconds(BASE, 0, scored, answered) + overhead_s
    step_s = rung(shape.seeds, answer + 1, scored, answered) - rung(shape.seeds, answer, scored, answered)
    return Plan(
        rates=shape.rates,
        longer=shape.longer,
        seeds=shape.seeds,
        search_steps=search,
        longer_steps=longer,
        answer_steps=answer,
        validation_rows=validation,
        test_rows=test,
        search_s=search_s,
        longer_s=longer_s,
        answer_s=answer_s,
        answer_step_s=step_s,
    )


def _fewest(limits: Limits) -> tuple[int, int]:
    return min(FEWEST_ROWS, limits.validation_rows), min(FEWEST_ROWS, limits.test_rows)


def _fewer_rows(limits: Limits) -> list[tuple[int, int]]:
    """Numbers of validation and test rows, from the most down: each time about two thirds."""
    fewest, share = _fewest(limits), 1.0
    pairs: list[tuple[int, int]] = []
    while not pairs or pairs[-1] != fewest:
        most = (int(limits.validation_rows * share), int(limits.test_rows * share))
        pairs.append((max(fewest[0], most[0]), max(fewest[1], most[1])))
        share *= 2 / 3
    return pairs


def shortened(plan: Plan, left_s: float, pace: float) -> int:
    """Steps of the answer's trials for the time that is left: never more than planned, nor fewer than in the search.

    Args:
        plan: that was made before.
        left_s: seconds that are left.
        pace: seconds of the rungs before, as a multiple of those predicted.
    """
    over_s = plan.answer_s * max(1.0, pace) - left_s
    if over_s <= 0 or plan.answer_step_s <= 0:
        return plan.answer_steps
    fewer = math.ceil(over_s / (plan.answer_step_s * max(1.0, pace)))
    return max(plan.search_steps, plan.longer_steps, plan.answer_steps - fewer)
