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
    best = [member for member in members if not any(better(other, member) for other in members if other != member)]
    return best or list(members)


def tiers(members: Sequence[int], better: Better) -> list[list[int]]:
    """The unbeaten members, then those that only members of the tiers before beat, and so on."""
    remaining, levels = list(members), []
    while remaining:
        tier = unbeaten(remaining, better)
        levels.append(tier)
        remaining = [member for member in remaining if member not in tier]
    return levels


def cheapest(members: Sequence[int], costs: Sequence[float | None], others: Sequence[float | None]) -> int | None:
    """The member of least known cost, then of least other cost, then the first; None if no cost is known."""
    priced = [member for member in members if costs[member] is not None]
    return min(priced, key=lambda member: (_number(costs[member]), _number(others[member])), default=None)


def walk(costs: Sequence[float | None], others: Sequence[float | None], better: Better) -> list[Choice]:
    """The choices from the least budget up, a new one wherever the answer changes.

    Args:
        costs: what each candidate needs of the budget; None if it is not known, which leaves it out.
        others: another cost, which decides between equal ones.
        better: the differences that are shown; a candidate is never preferred for any other.
    """
    choices: list[Choice] = []
    for budget in sorted({cost for cost in costs if cost is not None}):
        within = [candidate for candidate, cost in enumerate(costs) if cost is not None and cost <= budget]
        level = unbeaten(within, better)
        take = cheapest(level, costs, others)
        assert take is not None
        tied = tuple(candidate for candidate in level if candidate != take)
        if choices and choices[-1].take == take:
            choices[-1] = Choice(at_least=choices[-1].at_least, take=take, tied=tied)
        else:
            choices.append(Choice(at_least=budget, take=take, tied=tied))
    return choices


def pareto(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
    """The points that no other point beats in cost or gain without losing in the other, by ascending cost."""
    order = sorted(range(len(costs)), key=lambda point: (costs[point], -gains[point]))
    front: list[int] = []
    for point in order:
        if not front or gains[point] > gains[front[-1]]:
            front.append(point)
    return front


def _number(cost: float | None) -> float:
    return float("inf") if cost is None else cost
