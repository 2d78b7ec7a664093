"""Which setting stands for each method: methods are compared by their best setting, not every setting with every other.

The best of many settings on the rows it is reported on looks better than it is, the more so the more were tried. The
report says how many were tried; rows that no choice has seen need an evaluation of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ray_peft.report.table import SeedGroup

MOST = 12
"""Settings that are compared where there is but one method to compare."""


def method_of(unit: SeedGroup) -> str:
    """The name of the method that a unit was trained with."""
    return unit.rows[0].result.spec.method.name


def chosen(members: Sequence[SeedGroup], quality: Callable[[SeedGroup], float]) -> list[SeedGroup]:
    """The best setting of every method, in the order of `members`; of a single method, its best `MOST` settings.

    The model without fine-tuning has no setting to choose, so each of its units stays.

    Args:
        members: units that can be compared with each other.
        quality: of a unit; higher is better. Of equal ones the first is taken.
    """
    by_method: dict[str, list[SeedGroup]] = {}
    for unit in members:
        if not unit.is_base:
            by_method.setdefault(method_of(unit), []).append(unit)
    most = MOST if len(by_method) == 1 else 1
    chosen = {
        unit.label
        for settings in by_method.values()
        for unit in (sorted(settings, key=quality, reverse=True)[:most] if len(settings) > most else settings)
    }
    return [unit for unit in members if unit.is_base or unit.label in chosen]
