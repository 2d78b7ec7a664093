"""Held-out rows one by one: which of them only one method got right, and which all of them missed."""

from __future__ import annotations

from collections.abc import Sequence

from ray_peft.report.digits import percent
from ray_peft.report.document import Block, Heading, Paragraph, Question, Questions, Table
from ray_peft.report.material import Material
from ray_peft.report.table import SeedGroup
from ray_peft.report.ties import Family, heading

RIGHT_FROM = 0.5
"""ROUGE-L from which on an answer counts as right, until the reader of the page chooses otherwise."""
MOST_SYSTEMS = 8
"""Systems whose answers stand side by side."""
MOST_CHARACTERS = 600
"""Of a text; the whole is in answers.jsonl."""
BUDGET = 1_200_000
"""Characters of all rows of a report together."""
_TEXT = (
    "Each answer has a ROUGE-L of its own. An answer counts as right from {right} on: a limit to sort rows by, which "
    "report.html lets you choose; it decides nothing else. A setting with several seeds is shown with its first seed."
)


def row_by_row(material: Material) -> list[Block]:
    """Per comparison the counts against the best system, and the rows themselves; nothing without answers."""
    families = [family for family in material.families if family.measure == "rouge_l" and len(family.units) > 1]
    blocks: list[Block] = []
    for number, family in enumerate(families, 1):
        if len(families) > 1:
            blocks.append(Heading(heading(family, number, families)))
        blocks += _family(family, material, BUDGET // len(families))
    return [Paragraph(_TEXT.format(right=RIGHT_FROM)), *blocks] if blocks else []


def _family(family: Family, material: Material, budget: int) -> list[Block]:
    order = sorted(range(len(family.units)), key=lambda place: family.values[place], reverse=True)[:MOST_SYSTEMS]
    base = [place for place, unit in enumerate(family.units) if unit.is_base]
    if base and base[0] not in order:
        order[-1] = base[0]
    systems = [(family.units[place].label, _first_seed(family.units[place], material)) for place in order]
    scores = [material.statistics.rouge(trial_id) for _, trial_id in systems]
    blocks: list[Block] = [_counts([label for label, _ in systems], scores)]
    questions, left_out = _questions([trial_id for _, trial_id in systems], scores, material, budget)
    if left_out:
        text = f"Shown are the {len(questions)} rows at which the methods differ most; {left_out} others are left out."
        blocks.append(Paragraph(text))
    return [
        *blocks,
        Questions(
            measure="ROUGE-L",
            systems=tuple(label for label, _ in systems),
            right_from=RIGHT_FROM,
            questions=tuple(questions),
        ),
    ]


def _first_seed(unit: SeedGroup, material: Material) -> str:
    return next(row.trial_id for row in unit.finished if row.trial_id in material.statistics)


def _counts(labels: Sequence[str], scores: Sequence[Sequence[float]]) -> Table:
    """The best system against each other one, and how many rows each system gets right."""
    right = [[score >= RIGHT_FROM for score in of_system] for of_system in scores]
    rows = len(right[0])
    lines = []
    for place, label in enumerate(labels):
        alone = sum(
            right[place][row] and not any(other[row] for other in right if other is not right[place])
            for row in range(rows)
        )
        only_best = sum(best and not own for best, own in zip(right[0], right[place], strict=True))
        only_own = sum(own and not best for best, own in zip(right[0], right[place], strict=True))
        neither = sum(not own and not best for best, own in zip(right[0], right[place], strict=True))
        counts = (alone, only_best, only_own, neither)
        lines.append((label, percent(sum(right[place]) / rows, 1), *map(str, counts)))
    header = ("Method", "Right", "Right where no other is", "Only the best is right", "The best is not", "Neither is")
    return Table(header=header, lines=tuple(lines), fits=True)


def _questions(
    trials: Sequence[str], scores: Sequence[Sequence[float]], material: Material, budget: int
) -> tuple[list[Question], int]:
    """As many rows as the budget of characters holds, first where the systems differ most, and the rest's number."""
    rows = range(len(scores[0]))
    order = sorted(rows, key=lambda row: max(s[row] for s in scores) - min(s[row] for s in scores), reverse=True)
    questions: list[Question] = []
    for row in order:
        question = Question(
            number=row,
            prompt=_cut(material.prompts[row]) if row in material.prompts else None,
            reference=_cut(material.answers[trials[0]][1][row]),
            answers=tuple(_cut(material.answers[trial][0][row]) for trial in trials),
            scores=tuple(round(of_system[row], 3) for of_system in scores),
        )
        budget -= len(question.prompt or "") + len(question.reference) + sum(map(len, question.answers))
        if budget < 0 and questions:
            break
        questions.append(question)
    return questions, len(order) - len(questions)


def _cut(text: str) -> str:
    more = len(text) - MOST_CHARACTERS
    return text if more <= 0 else f"{text[:MOST_CHARACTERS]} [{more} more characters in answers.jsonl]"
