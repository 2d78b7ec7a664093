"""The answer in at most five lines: which method to take, what it gains, what is tied with it, and how sure that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ray_peft.report.choosing import method_of
from ray_peft.report.costs import Costs, costs
from ray_peft.report.digits import MISSING, duration, fixed, gib, listed
from ray_peft.report.document import Table
from ray_peft.report.material import Material
from ray_peft.report.recommend import cheapest
from ray_peft.report.table import SeedGroup
from ray_peft.report.ties import LOSS_MARGIN, Family
from ray_peft.trial.result import Status

LINES = 5
"""At most."""
NAMES = 2
"""Names that a line spells out; of more it gives the number."""


def answer(material: Material) -> tuple[str, ...]:
    """At most five sentences; of several models one for each, and how many were left out."""
    compared = [family for family in material.families if len(family.units) > 1]
    if not compared:
        return ()
    if len(compared) == 1:
        (family,) = compared
        needs = costs(family.units)
        lines = [best_line(family, needs), *_cheaper(family, needs), base_line(family)]
        return (*lines, *_certainty(family), *_unfinished(material))[:LINES]
    shown = compared if len(compared) <= LINES else compared[: LINES - 1]
    lines = [f"{family.model}: {best_line(family, costs(family.units))}" for family in shown]
    lines += [f"{len(compared) - len(shown)} further comparisons: see Recommendation."] * (len(shown) < len(compared))
    return tuple(lines)


def best_line(family: Family, needs: Costs) -> str:
    """What to take, and what cannot be told apart from it; where fine-tuning is not shown to help, that."""
    best = family.best()
    take = taken(family, needs)
    value = f"{family.measure_name} {_value(family, take)}"
    others = [name(family.units[place]) for place in best if place != take]
    by_loss = [name(family.units[place]) for place in family.tiers()[0] if place not in best]
    if not family.units[take].is_base and any(family.units[place].is_base for place in best):
        better = "shown to be better" if family.paired else f"better by more than {LOSS_MARGIN:.0%}"
        return (
            f"No {_kind(family)} is {better} than the model without fine-tuning. The cheapest of what is tied with it: "
            f"{name(family.units[take])} ({value}), of {len(best)}."
        )
    if by_loss:
        alike = f", and {few(others)} cannot be told apart from it" if others else ""
        return (
            f"Take {name(family.units[take])}: {value}; no {_kind(family)} is shown to be better than it{alike}. By "
            f"{family.loss_name} of the same rows these are shown to be worse: {few(by_loss)}."
        )
    if not others:
        how = "shown to be better" if family.paired else f"lower by more than {LOSS_MARGIN:.0%}"
        return f"Take {name(family.units[take])}: {value}, {how} than every other {_kind(family)}."
    why = "shown to be better than it" if family.paired else f"lower by more than {LOSS_MARGIN:.0%}"
    return (
        f"Take {name(family.units[take])}: {value}; no {_kind(family)} is {why}, "
        f"and {few(others)} cannot be told apart from it."
    )


def taken(family: Family, needs: Costs) -> int:
    """The place of the best unit; of those that are tied, of one that costs little: memory first, then time."""
    best = family.best()
    for values, others, problem in (
        (needs.memory_gib, needs.time_s, needs.memory_problem),
        (needs.time_s, needs.memory_gib, needs.time_problem),
    ):
        place = None if problem else cheapest(best, values, others)
        if place is not None:
            return place
    sign = 1 if family.gains else -1
    return max(best, key=lambda place: sign * family.values[place])


def base_line(family: Family) -> str:
    """Whether fine-tuning helps."""
    bases = bases_of(family)
    if not bases:
        return "Whether fine-tuning helps cannot be said: there is no finished row of the model without it (none)."
    better, worse = ("shown to be better", "shown to be worse") if family.paired else ("lower loss", "higher loss")
    groups: dict[str, list[int]] = {
        better: [place for place, base in bases.items() if family.better(place, base)],
        worse: [place for place, base in bases.items() if family.better(base, place)],
    }
    if (losses := family.losses) is not None:
        open_pairs = [(place, base) for place, base in bases.items() if place not in {*groups[better], *groups[worse]}]
        by = f"by {family.loss_name} of the same rows alone"
        groups[f"{better} {by}"] = [place for place, base in open_pairs if losses.better(place, base)]
        groups[f"{worse} {by}"] = [place for place, base in open_pairs if losses.better(base, place)]
    decided = {place for places in groups.values() for place in places}
    alike = "no difference that these rows can show" if family.paired else "no difference beyond the margin"
    groups[alike] = [place for place in bases if place not in decided]
    sentence = "; ".join(
        f"{title}: {few([name(family.units[place]) for place in places])}" for title, places in groups.items() if places
    )
    return f"Against the model without fine-tuning: {sentence}."


def bases_of(family: Family) -> dict[int, int]:
    """By the place of a trained unit, the place of the model without fine-tuning that it is compared with."""
    homes = {row.trial_id: place for place, unit in enumerate(family.units) for row in unit.rows}
    return {
        place: homes[row.base.trial_id]
        for place, unit in enumerate(family.units)
        for row in unit.finished
        if row.base is not None and row.base.trial_id in homes
    }


def answer_table(family: Family) -> Table:
    """The compared units, the best first, in eight columns."""
    needs = costs(family.units)
    sign = 1 if family.gains else -1
    tiers, best = family.tiers(), family.best()
    order = [
        place
        for tier in tiers
        for place in sorted(tier, key=lambda place: (place in best, sign * family.values[place]), reverse=True)
    ]
    bases = bases_of(family)
    lines = tuple(
        (
            name(family.units[place]),
            _value(family, place, measure=False),
            _against(family, place, bases.get(place)),
            _verdict(place, best, tiers[0]),
            fixed(needs.memory_gib[place], 2),
            duration(needs.time_s[place]),
            str(len(family.units[place].finished)),
            str(_tried(family, family.units[place])),
        )
        for place in order
    )
    measured = (f"{family.measure_title} [95 %]", "vs base", "Verdict")
    header = ("Method", *measured, "GiB", "Training", "Seeds", "Settings")
    return Table(header=header, lines=lines, text_columns=1, fits=True)


def name(unit: SeedGroup) -> str:
    """Its label; of the model without fine-tuning with these words."""
    return f"{unit.label} (no fine-tuning)" if unit.is_base else unit.label


def few(names: Sequence[str]) -> str:
    """Up to `NAMES` names, of more the first ones and the number of the others."""
    if len(names) <= NAMES + 1:
        return listed(names)
    return f"{', '.join(names[:NAMES])} and {len(names) - NAMES} others"


def _verdict(place: int, best: Sequence[int], unbeaten: Sequence[int]) -> str:
    if place in best:
        return "best" if len(best) == 1 else "best, tied"
    return "worse by loss" if place in unbeaten else "worse"


def _kind(family: Family) -> str:
    """What is compared: methods, or settings where there is one method."""
    methods = [method_of(unit) for unit in family.units if not unit.is_base]
    return "setting" if len(methods) > 1 and len(set(methods)) == 1 else "method"


def _value(family: Family, place: int, *, measure: bool = True) -> str:
    text = fixed(family.values[place], 4)
    if not family.intervals:
        return text
    interval = family.intervals[place]
    ends = f"{fixed(interval.low, 3)} to {fixed(interval.high, 3)}"
    return f"{text} ({ends})" if measure else f"{text} [{ends}]"


def _against(family: Family, place: int, base: int | None) -> str:
    if base is None:
        return MISSING
    text = fixed(family.values[place] - family.values[base], 4, signed=True)
    return text if family.better(place, base) or family.better(base, place) else f"{text}, tied"


def _cheaper(family: Family, needs: Costs) -> list[str]:
    """Of tied units, the one of least memory and the one of least time, if these are different ones."""
    best = family.best()
    if len(best) < 2:
        return []
    memory = None if needs.memory_problem else cheapest(best, needs.memory_gib, needs.time_s)
    time = None if needs.time_problem else cheapest(best, needs.time_s, needs.memory_gib)
    reasons: dict[int, list[str]] = {}
    if memory is not None:
        reasons.setdefault(memory, []).append(f"the least memory ({gib(needs.memory_gib[memory])})")
    if time is not None:
        reasons.setdefault(time, []).append(f"the least training time ({duration(needs.time_s[time])})")
    parts = [f"{name(family.units[place])} takes {listed(words)}" for place, words in reasons.items()]
    return [f"Of these {'; '.join(parts)}."] if parts else []


def _tried(family: Family, unit: SeedGroup) -> int:
    """Settings of its method that were scored, itself among them."""
    if unit.is_base:
        return 1
    return sum(method_of(other) == method_of(unit) for other in (*family.units, *family.passed_over))


def _certainty(family: Family) -> list[str]:
    """Rows, seeds and choices behind the answer."""
    parts = []
    if family.paired:
        parts.append(f"{family.rows} {'answered' if family.measure == 'rouge_l' else 'held-out'} rows")
    seeds = [len(unit.finished) for unit in family.units if not unit.is_base]
    if seeds:
        single = "one seed each (how much another seed would change is not known)"
        parts.append(single if max(seeds) == 1 else f"{min(seeds)} to {max(seeds)} seeds" if min(seeds) < max(seeds)
                     else f"{max(seeds)} seeds")  # fmt: skip
    if family.passed_over:
        settings = len(family.passed_over) + sum(not unit.is_base for unit in family.units)
        parts.append(f"{settings} settings, of which the best were chosen on these rows, which flatters them")
    return [f"It rests on {listed(parts)}."] if parts else []


def _unfinished(material: Material) -> list[str]:
    words: dict[Status, str] = {
        "stopped_early": "were stopped early", "out_of_memory": "ran out of memory", "failed": "failed",
        "cancelled": "were cancelled",
    }  # fmt: skip
    counts = Counter(row.status for row in material.rows)
    parts = [f"{counts[status]} {word}" for status, word in words.items() if counts[status]]
    missing = len(set(material.planned) - {row.trial_id for row in material.rows})
    parts += [f"{missing} did not run"] if missing else []
    total = len({*material.planned, *(row.trial_id for row in material.rows)})
    return [f"Of {total} trials {listed(parts)}: see the appendix."] if parts else []
