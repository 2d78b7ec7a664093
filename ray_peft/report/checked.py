"""The section on checks of answers that need no judge."""

from __future__ import annotations

from ray_peft.metrics.answer_checks import ORDER, REPEATS_FROM, check
from ray_peft.report.columns import Column, row_table
from ray_peft.report.digits import fixed, percent
from ray_peft.report.document import Block, Paragraph
from ray_peft.report.material import Material

_TEXT = (
    "Ended: answers that ended by themselves, and not because evaluation.max_new_tokens was reached. Length: median of "
    f"the answer's words over the reference's. Repeated: share of {ORDER}-grams that the same answer had before, and "
    f"answers of which at least {REPEATS_FROM:.0%} are. Script: answers in the script of their reference, such as "
    "Latin or Han. None of this says whether an answer is right."
)


def checks(material: Material) -> list[Block]:
    """One line a trial with answers: all of a small sweep, of a large one the compared ones."""
    rows = [row for row in material.main_rows if row.trial_id in material.statistics]
    values = {row.trial_id: check(*material.answers[row.trial_id], material.ended.get(row.trial_id)) for row in rows}
    columns: list[Column] = [
        ("Ended", lambda row: percent(values[row.trial_id].ended, 1)),
        ("Empty", lambda row: percent(values[row.trial_id].empty, 1)),
        ("Length", lambda row: fixed(values[row.trial_id].length, 2)),
        ("Repeated", lambda row: percent(values[row.trial_id].repeated, 1)),
        ("Answers that repeat", lambda row: percent(values[row.trial_id].repeating, 1)),
        ("Same script", lambda row: percent(values[row.trial_id].same_script, 1)),
    ]
    return [*row_table(rows, columns), Paragraph(_TEXT)] if rows else []
