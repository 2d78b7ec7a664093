"""Which candidate to take for which budget, from costs and from the differences that are shown: arithmetic only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Better: TypeAlias = Callable[[int, int], bool]
"""Whether the first candidate is shown to be better than the second."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What to take in one range of budgets."""

    at_least: float
    """Where the range begins; it ends where the next one begins."""
    take: int
    """The cheapest candidate that none within the budget is shown to be better than."""
    tied: tuple[int, ...] = ()
    """The others within the range that none is shown to be better than."""


def unbeaten(members: Sequence[int], better: Better) -> list[int]:
    """The members that no other member is shown to be better than; all of them if each is beaten by some other."""
    kept = [one for one in members if not any(better(other, one) for other in members if other != one)]
    return kept or list(members)


def tiers(members: Sequence[int], better: Better) -> list[list[int]]:
    """The unbeaten members, then those that only members of the tiers before beat, and so on."""
    left, found = list(members), []
    while left:
        tier = unbeaten(left, better)
        found.append(tier)
        left = [one for one in left if one not in tier]
    return found


def cheapest(members: Sequence[int], costs: Sequence[float | None], others: Sequence[float | None]) -> int | None:
    """The member of least known cost, then of least other cost, then the first; None if no cost is known."""
    known = [one for one in members if costs[one] is not None]
    return min(known, key=lambda one: (_number(costs[one]), _number(others[one])), default=None)


def walk(costs: Sequence[float | None], others: Sequence[float | None], better: Better) -> list[Choice]:
    """The choices from the least budget up, a new one wherever the answer changes.

    Args:
        costs: what each candidate needs of the budget; None if it is not known, which leaves it out.
        others: another cost, which decides between equal ones.
        better: the differences that are shown; a candidate is never preferred for any other.
    """
    found: list[Choice] = []
    for budget in sorted({cost for cost in costs if cost is not None}):
        within = [one for one, cost in enumerate(costs) if cost is not None and cost <= budget]
        level = unbeaten(within, better)
        take = cheapest(level, costs, others)
        assert take is not None
        tied = tuple(one for one in level if one != take)
        if found and found[-1].take == take:
            found[-1] = Choice(at_least=found[-1].at_least, take=take, tied=tied)
        else:
            found.append(Choice(at_least=budget, take=take, tied=tied))
    return found


def pareto(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """The points that no other point beats in cost or gain without losing in the other, by ascending cost."""
    order = sorted(range(len(costs)), key=lambda one: (costs[one], -gains[one]))
    front: list[int] = []
    for one in order:
        if not front or gains[one] > gains[front[-1]]:
            front.append(one)
    return front


def _number(cost: float | None) -> float:
    return float("inf") if cost is None else cost
