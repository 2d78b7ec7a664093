"""The answer in five lines: which method to take, what it is not shown to differ from, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_peft.compare.budget import BASE
from ray_peft.compare.rungs import Chosen, rate_of
from ray_peft.report.costs import costs
from ray_peft.report.digits import duration, fixed, gib, listed
from ray_peft.report.material import Material
from ray_peft.report.recommend import cheapest
from ray_peft.report.table import SeedGroup
from ray_peft.report.ties import FEWEST_ROWS, MEASURES, Family, Measure
from ray_peft.spec import TrialSpec

_MEASURES: dict[Measure, str] = {**MEASURES, "eval_loss": "loss"}


@dataclass(frozen=True)
class Answer:
    """What a comparison says."""

    take: TrialSpec | None
    """One of the trials of the method to take; None if no method can be recommended."""
    lines: tuple[str, ...]


def answer(material: Material, chosen: Mapping[str, Chosen]) -> Answer:
    """The method to take: of those that none is shown to be better than, the cheapest.

    Where answers or rewards decide, the loss on the same rows (of pairs: DPO's) decides between methods that are not
    shown to differ: it takes fewer rows to show a difference. Cheap is what takes the least memory on a GPU, the least
    time on a CPU.

    Args:
        material: of the last rung.
        chosen: the settings of each method, with how they were chosen.
    """
    families = [family for family in material.families if any(not unit.is_base for unit in family.units)]
    if not families:
        reasons = "; ".join(f"{name}: {why}" for name, why in material.left_out.items())
        return Answer(None, (f"No answer: no trained method has scores to compare ({reasons or 'none finished'}).",))
    family = max(families, key=lambda family: len(family.units))
    base = next((place for place, unit in enumerate(family.units) if unit.is_base), None)
    best = [place for place in family.best() if place != base]
    if not best:
        return Answer(None, (f"Take none of them: {_score(family, base or 0)} of the untouched base is the best.",))
    needs = costs(family.units)
    on_gpu = family.units[best[0]].rows[0].on_gpu and needs.memory_problem is None
    spent = (needs.memory_gib, needs.time_s) if on_gpu else (needs.time_s, needs.memory_gib)
    take = cheapest(best, *spent)
    take = best[0] if take is None else take
    unit = family.units[take]
    trial = unit.rows[0].result.spec
    lines = (
        f"Take {_name(unit)}: {_score(family, take)} on {family.rows} test {_rows(family)}{_seeds(unit)}"
        + (f"; the untouched base: {_score(family, base)}." if base is not None else "."),
        _others(family, take, base),
        f"It takes {gib(needs.memory_gib[take])} and {duration(needs.time_s[take])} for {unit.rows[0].result.steps} "
        f"steps{_least(len(best), on_gpu=on_gpu)}.",
        _how_chosen(family, chosen),
    )
    if base is not None and (forgotten := _forgotten(unit, family.units[base])):
        lines = (*lines[:2], f"{lines[2]} {forgotten}", *lines[3:])
    return Answer(trial, lines)


def _name(unit: SeedGroup) -> str:
    method = unit.rows[0].result.spec.method
    return method.name if unit.is_base else f"{method.name} (learning rate {rate_of(method):g})"


def _rows(family: Family) -> str:
    return "pairs" if family.measure == "reward_accuracy" else "rows"


def _score(family: Family, place: int) -> str:
    text = f"{_MEASURES[family.measure]} {fixed(family.values[place], 4)}"
    if not family.intervals:
        return text
    interval = family.intervals[place]
    return f"{text} ({fixed(interval.low, 4)} to {fixed(interval.high, 4)})"


def _seeds(unit: SeedGroup) -> str:
    """What the score and its 95 % interval are over."""
    count = len(unit.finished)
    return f", mean of {count} seeds (95 % over rows and seeds)" if count > 1 else ", one seed (95 % over rows)"


def _others(family: Family, take: int, base: int | None) -> str:
    """What the chosen method is shown to be better than, and what not."""
    losses = family.losses
    others = [place for place in range(len(family.units)) if place not in (take, base)]
    worse = [place for place in others if family.better(take, place)]
    by_loss_alone = [place for place in others if place not in worse and losses and losses.better(take, place)]
    alike = [place for place in others if place not in worse + by_loss_alone]
    parts = []
    if base is not None and not family.better(take, base):
        if losses is not None and losses.better(take, base):
            values = f"{fixed(losses.values[take], 3)} for {fixed(losses.values[base], 3)}"
            by = f"{family.loss_name} on these {_rows(family)} alone"
            parts.append(f"Shown to be better than the untouched base by {by}, {values}")
        else:
            parts.append(f"These {_rows(family)} do not show that it is better than the untouched base")
    if by_loss_alone and losses is not None:
        named = [f"{_name(losses.units[place])} {fixed(losses.values[place], 3)}" for place in by_loss_alone]
        own = fixed(losses.values[take], 3)
        parts.append(f"Shown to be worse by {family.loss_name} on these {_rows(family)}, for {own}: {listed(named)}")
    if alike:
        parts.append(f"Not shown to differ from it: {listed(_scored_names(family, alike))}")
    if worse:
        parts.append(f"Shown to be worse: {listed(_scored_names(family, worse))}")
    if family.rows < FEWEST_ROWS:
        parts.append(f"fewer than {FEWEST_ROWS} test {_rows(family)} show no difference")
    text = "; ".join([*parts[:1], *(part[0].lower() + part[1:] for part in parts[1:])])
    return f"{text}." if parts else "No other method was compared."


def _scored_names(family: Family, places: Sequence[int]) -> list[str]:
    return [f"{_name(family.units[place])} {fixed(family.values[place], 4)}" for place in places]


def _least(tied: int, *, on_gpu: bool) -> str:
    if tied < 2:
        return ""
    return f", the least {'memory' if on_gpu else 'time'} of the {tied} that none is shown to be better than"


def _forgotten(unit: SeedGroup, base: SeedGroup) -> str:
    """What it lost of a general text; nothing where that was not measured."""
    after, before = (group.spread(lambda row: row.general_loss.value) for group in (unit, base))
    if after is None or before is None:
        return ""
    change = fixed(after.mean - before.mean, 3, signed=True)
    return f"Loss on a general text, of which a rise is forgetting: {fixed(after.mean, 3)} ({change} to the base)."


def _how_chosen(family: Family, chosen: Mapping[str, Chosen]) -> str:
    """How rates were chosen, and which of them lie at an edge of what was tried."""
    edges = [method for method, settings in chosen.items() if settings.at_edge and method != BASE]
    text = f"Learning rates were chosen by {family.loss_name} on validation {_rows(family)}, within each method."
    if edges:
        text += f" Caution: at the edge of those tried: {listed(edges)}; a wider range may be better."
    return text
