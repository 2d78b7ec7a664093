"""The recommendation in words: which trial to take for which memory and time, and what the rows cannot show."""

from collections.abc import Callable, Sequence

from ray_peft.report.answer import answer, base_line, best_line, few, name
from ray_peft.report.costs import Costs, costs
from ray_peft.report.digits import MISSING, duration, gib
from ray_peft.report.document import Block, Bullets, Heading, Paragraph, Table
from ray_peft.report.material import Material
from ray_peft.report.recommend import Choice, walk
from ray_peft.report.table import SeedGroup
from ray_peft.report.ties import FEWEST_ROWS, LOSS_MARGIN, Family, heading

_RULES = (
    "Candidates are the chosen settings of each method: those of the best mean over seeds; trials that differ only in "
    "their seed are one candidate. Models with random weights are no candidates. A setting that is chosen on the rows "
    "it is reported on looks better than it is, the more so the more were tried.",
    "Quality is ROUGE-L where held-out rows were answered, else the held-out loss; of trials that learned preferences, "
    "the reward accuracy on held-out pairs, compared in the same way. Of the candidates that it does not tell "
    "apart, the answer leaves out those that another of them is shown to be better than by the loss of the same rows "
    "(of pairs: DPO's loss).",
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
"""With fewer held-out rows, intervals are right for scores that are spread evenly, and too narrow for rare extremes."""


def advice(material: Material) -> list[Block]:
    """The recommendation: the answer in at most five lines, the budgets, what cannot be said, and the rules."""
    lines = answer(material)
    return [*([Bullets(lines)] if lines else []), *reasons(material), *rules(material)]


def reasons(material: Material) -> list[Block]:
    """What to take for which memory and time, and what the rows cannot show."""
    if not material.rows:
        return []
    blocks: list[Block] = []
    compared = [family for family in material.families if len(family.units) > 1]
    for number, family in enumerate(compared, 1):
        needs = costs(family.units)
        if len(compared) > 1:
            blocks.append(Heading(heading(family, number, compared)))
            blocks.append(Bullets((best_line(family, needs), base_line(family))))
        blocks += _family(family, needs)
    if silence := _cannot_say(material):
        blocks.append(Bullets(tuple(silence)))
    return blocks


def rules(material: Material) -> list[Block]:
    """By which rules the recommendation is given."""
    if not material.rows:
        return []
    by_row_losses = any(
        family.paired and family.measure == "eval_loss" and family.units[0].rows[0].of_images
        for family in material.families
    )
    return [Heading("Rules of the recommendation"), Bullets(_ROW_LOSS_RULES if by_row_losses else _RULES)]


def _family(family: Family, needs: Costs) -> list[Block]:
    blocks: list[Block] = []
    for resource, values, others, text, problem in (
        ("Peak memory", needs.memory_gib, needs.time_s, gib, needs.memory_problem),
        ("Training time", needs.time_s, needs.memory_gib, duration, needs.time_problem),
    ):
        if problem is not None:
            blocks.append(Paragraph(f"{resource}: there is no recommendation, since {problem}."))
        elif choices := walk(values, others, family.better):
            blocks.append(_budgets(resource, family, choices, [text(value) for value in values], text))
    return blocks


def _budgets(
    resource: str, family: Family, choices: Sequence[Choice], needs: Sequence[str], text: Callable[[float], str]
) -> Block:
    lines = []
    for choice, following in zip(choices, [*choices[1:], None], strict=True):
        most = f" to under {text(following.at_least)}" if following else " on"
        tied = few([f"{name(family.units[place])}: {needs[place]}" for place in choice.tied])
        lines.append((f"from {text(choice.at_least)}{most}", name(family.units[choice.take]), tied or MISSING))
    header = (f"{resource} at hand", "Take", "Tied with it, and needs as much or more")
    return Table(header=header, lines=tuple(lines), text_columns=3)


def _cannot_say(material: Material) -> list[str]:
    """The questions that this report leaves open, one sentence each."""
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
    paired = [(family.rows, family.measure) for family in families if family.paired]
    if smallest := sorted(entry for entry in paired if entry[0] < _FEW_ROWS):
        subject = "Answered rows" if smallest[0][1] == "rouge_l" else "Held-out rows"
        sentences.append(
            f"{subject}: {smallest[0][0]}. So few may hold none of the rare cases that decide which one is better."
        )
    if single := [unit.label for family in families for unit in family.units if _one_seed(unit)]:
        trained = sum(not unit.is_base for family in families for unit in family.units)
        names = "Every trained row" if len(single) == trained else few(single)
        sentences.append(f"{names}: one seed, so how much another seed would change it cannot be said.")
    if resumed := [row for unit in units for row in unit.finished if row.result.resumed_from_step is not None]:
        steps = few([f"{row.label} (from step {row.result.resumed_from_step})" for row in resumed])
        sentences.append(
            f"Interrupted, then continued from a checkpoint: {steps}. Time, tokens and peaks are those of all "
            "attempts, without what was done twice."
        )
    memory = [
        f"{unit.label}: {gib(max(peaks))}"
        if (peaks := [row.peak_memory_gib for row in unit.rows if row.peak_memory_gib is not None])
        else unit.label
        for unit in units
        if not unit.finished and any(row.status == "out_of_memory" for row in unit.rows)
    ]
    if memory:
        sentences.append(f"Ran out of memory here, so no candidate: {few(memory)}.")
    others = [
        f"{label} ({reason})"
        for label, reason in material.left_out.items()
        if reason != "did not finish" or not any(entry.startswith(label) for entry in memory)
    ]
    if others and finished:
        sentences.append(f"No candidates: {few(others)}.")
    return sentences


def _one_seed(unit: SeedGroup) -> bool:
    """Whether another seed would have trained another model, and there is none."""
    return len(unit.finished) == 1 and not unit.is_base
