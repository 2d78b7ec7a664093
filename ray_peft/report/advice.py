"""The recommendation in words: what to take for which memory and time, and what the rows cannot say."""

from collections.abc import Callable, Sequence

from ray_peft.report.costs import Costs, costs
from ray_peft.report.digits import MISSING, duration, fixed, gib, listed
from ray_peft.report.document import Block, Bullets, Heading, Paragraph, Table
from ray_peft.report.material import Material
from ray_peft.report.recommend import Choice, cheapest, walk
from ray_peft.report.table import SeedGroup
from ray_peft.report.ties import FEWEST_ROWS, LOSS_MARGIN, Family, heading

_RULES = (
    "Candidates are the finished trials, those that differ in their seed alone as one. Models with random weights are "
    "none.",
    "Quality is ROUGE-L where held-out rows were answered, else the held-out loss.",
    "One candidate is shown to be better than another if a permutation test of their differences in ROUGE-L, row by "
    "row and corrected for all pairs, says so, and the 95 % interval of the difference lies above zero. Else they are "
    f"tied, and on fewer than {FEWEST_ROWS} held-out rows all are.",
    "Held-out losses are compared in the same way where those of single rows are on file, and the ranges over seeds "
    f"must not touch. Where only means are on file, they count as tied if nearer than {LOSS_MARGIN:.0%} of the lower "
    "one, too.",
    "Within a budget, the cheapest of the candidates that no other candidate within it is shown to be better than is "
    "taken: by peak memory for a memory budget, by training time for a time budget. A difference that is not shown "
    "never decides.",
    "Peak memory is what tensors took, the greatest over seeds: on a GPU allow for what the allocator reserves on top "
    "(Resources). Training time is the mean over seeds.",
    "An ensemble takes the training time of all its members, and the greatest of their peaks and its own.",
)

_ROW_LOSS_RULES = (
    *_RULES[:1],
    "Quality is the loss on the held-out images: the same images, timesteps and noise for all candidates. It says how "
    "well the model removes noise from them, which is not how its own images look: see Images and the style scores.",
    "One candidate is shown to be better than another if a permutation test of their differences in loss, image by "
    "image and corrected for all pairs, says so, the 95 % interval of the difference lies below zero, and the ranges "
    f"over seeds do not touch. Else they are tied, and on fewer than {FEWEST_ROWS} held-out images all are.",
    *_RULES[4:],
)
"""Where the loss of every held-out image is known."""

_FEW_ROWS = 30
"""Held-out rows below which intervals are right for scores that are spread evenly, and too narrow for rare extremes."""


def advice(material: Material) -> list[Block]:
    """What can be recommended, what cannot be said, and the rules."""
    if not material.rows:
        return []
    blocks: list[Block] = []
    compared = [family for family in material.families if len(family.units) > 1]
    for number, family in enumerate(compared, 1):
        if len(compared) > 1:
            blocks.append(Heading(heading(family, number, compared)))
        blocks += _family(family, costs(family.units))
    if silence := _cannot_say(material):
        blocks.append(Bullets(tuple(silence)))
    by_row_losses = any(
        family.paired and family.measure == "eval_loss" and family.units[0].rows[0].of_images
        for family in material.families
    )
    return [*blocks, Heading("Rules of the recommendation"), Bullets(_ROW_LOSS_RULES if by_row_losses else _RULES)]


def _family(family: Family, needs: Costs) -> list[Block]:
    blocks: list[Block] = [Bullets((_best(family, needs), *_against_base(family)))]
    for name, values, others, text, problem in (
        ("Peak memory", needs.memory_gib, needs.time_s, gib, needs.memory_problem),
        ("Training time", needs.time_s, needs.memory_gib, duration, needs.time_problem),
    ):
        if problem is not None:
            blocks.append(Paragraph(f"{name}: which to take cannot be said, since {problem}."))
        elif choices := walk(values, others, family.better):
            blocks.append(_budgets(name, family, choices, [text(value) for value in values], text))
    return blocks


def _best(family: Family, needs: Costs) -> str:
    best = family.tiers()[0]
    by_score = family.paired
    measure = "ROUGE-L" if family.measure == "rouge_l" else "held-out loss"
    names = [_name(family.units[place]) for place in best]
    values = listed([fixed(family.values[place], 4) for place in best])
    start = f"Best quality: {listed(names)} ({measure} {values})"
    if len(best) == 1:
        return f"{start}, {'shown to be better' if by_score else 'lower by more than the margin'} than every other row."
    text = (
        f"{start}: no row is shown to be better than any of these, and between them there is no difference that these "
        "rows can show."
        if by_score
        else f"{start}: no loss is lower than any of these by more than the margin."
    )
    return f"{text} {_cheaper(family, best, needs)}".rstrip()


def _cheaper(family: Family, best: Sequence[int], needs: Costs) -> str:
    """Which of tied candidates to take."""
    memory = None if needs.memory_problem else cheapest(best, needs.memory_gib, needs.time_s)
    time = None if needs.time_problem else cheapest(best, needs.time_s, needs.memory_gib)
    reasons = []
    if memory is not None:
        reasons.append((memory, f"the least memory ({gib(needs.memory_gib[memory])})"))
    if time is not None:
        reasons.append((time, f"the least training time ({duration(needs.time_s[time])})"))
    picks: dict[int, list[str]] = {}
    for place, reason in reasons:
        picks.setdefault(place, []).append(reason)
    sentences = [
        f"{_name(family.units[place])}, which takes {listed(advantages)}" for place, advantages in picks.items()
    ]
    return f"Of these the cheaper is recommended: {'; or '.join(sentences)}." if sentences else ""


def _against_base(family: Family) -> list[str]:
    homes = {row.trial_id: place for place, unit in enumerate(family.units) for row in unit.rows}
    bases = {
        place: homes[row.base.trial_id]
        for place, unit in enumerate(family.units)
        for row in unit.finished
        if row.base is not None and row.base.trial_id in homes
    }
    if not bases:
        return ["Whether fine-tuning helps cannot be said: there is no finished row of the model without it (none)."]
    by_score = family.paired
    better, worse = ("shown to be better", "shown to be worse") if by_score else ("lower loss", "higher loss")
    groups: dict[str, list[int]] = {
        better: [place for place, base in bases.items() if family.better(place, base)],
        worse: [place for place, base in bases.items() if family.better(base, place)],
    }
    decided = {place for places in groups.values() for place in places}
    alike = "no difference that these rows can show" if by_score else "no difference beyond the margin"
    groups[alike] = [place for place in bases if place not in decided]
    sentence = "; ".join(
        f"{name}: {listed([_name(family.units[place]) for place in places])}"
        for name, places in groups.items()
        if places
    )
    return [f"Against the model without fine-tuning: {sentence}."]


def _budgets(
    name: str, family: Family, choices: Sequence[Choice], needs: Sequence[str], text: Callable[[float], str]
) -> Block:
    lines = []
    for choice, following in zip(choices, [*choices[1:], None], strict=True):
        most = f" to under {text(following.at_least)}" if following else " on"
        tied = ", ".join(f"{_name(family.units[place])}: {needs[place]}" for place in choice.tied)
        lines.append((f"from {text(choice.at_least)}{most}", _name(family.units[choice.take]), tied or MISSING))
    header = (f"{name} at hand", "Take", "Tied with it, and needs as much or more")
    return Table(header=header, lines=tuple(lines), text_columns=3)


def _cannot_say(material: Material) -> list[str]:
    """What this report leaves open, one sentence each."""
    units, families = material.units, material.families
    finished = [unit for unit in units if unit.finished]
    sentences = []
    if not finished:
        sentences.append("No trial finished, so nothing can be recommended.")
    elif not families:
        sentences.append("No finished trial has a quality, so nothing can be recommended.")
    elif all(len(family.units) == 1 for family in families):
        sentences.append(
            "Only one row is finished and scored, so there is nothing to compare it with."
            if len(families) == 1
            else "No two rows were scored on the same held-out rows, so nothing can be compared."
        )
    if any(not family.paired for family in families):
        sentences.append(
            "No answers are on file, so quality is the held-out loss, and whether a difference in it is more than the "
            "choice of held-out rows cannot be said."
        )
    if few := sorted((family.rows, family.measure) for family in families if family.paired and family.rows < _FEW_ROWS):
        subject = "Answered rows" if few[0][1] == "rouge_l" else "Held-out rows"
        sentences.append(
            f"{subject}: {few[0][0]}. So few may hold none of the rare cases that decide which one is better."
        )
    if single := [unit.label for family in families for unit in family.units if _one_seed(unit)]:
        trained = sum(not unit.is_base for family in families for unit in family.units)
        names = "Every trained row" if len(single) == trained else listed(single)
        sentences.append(f"{names}: one seed, so how much another seed would change it cannot be said.")
    if resumed := [row for unit in units for row in unit.finished if row.result.resumed_from_step is not None]:
        steps = listed([f"{row.label} (from step {row.result.resumed_from_step})" for row in resumed])
        sentences.append(
            f"Interrupted, and gone on from a checkpoint: {steps}. Time, tokens and peaks are those of all attempts, "
            "without what was done twice."
        )
    memory = [
        f"{unit.label}: {gib(max(peaks))}"
        if (peaks := [row.peak_memory_gib for row in unit.rows if row.peak_memory_gib is not None])
        else unit.label
        for unit in units
        if not unit.finished and any(row.status == "out_of_memory" for row in unit.rows)
    ]
    if memory:
        sentences.append(f"Ran out of memory here, so no candidate: {listed(memory)}.")
    others = [
        f"{label} ({reason})"
        for label, reason in material.left_out.items()
        if reason != "did not finish" or not any(entry.startswith(label) for entry in memory)
    ]
    if others and finished:
        sentences.append(f"No candidates: {listed(others)}.")
    return sentences


def _name(unit: SeedGroup) -> str:
    return f"{unit.label} (no fine-tuning)" if unit.is_base else unit.label


def _one_seed(unit: SeedGroup) -> bool:
    """Whether another seed would have trained another model, and there is none."""
    return len(unit.finished) == 1 and not unit.is_base
