"""What can be said of an answer without a judge: how long it is, whether it repeats itself, in which script it is.

Source of the share of repeated n-grams: Welleck et al. 2020, Neural text generation with unlikelihood training, ICLR
(seq-rep-4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from ray_peft.metrics.scripts import script, words

ORDER = 4
REPEATS_FROM = 0.3
"""From this share of repeated 4-grams on an answer counts as one that repeats itself."""


@dataclass(frozen=True, kw_only=True)
class AnswerChecks:
    """Over all answers of a trial; None where no answer can be checked so."""

    ended: float | None
    """Share of answers that ended by themselves, and not at the greatest number of new tokens."""
    empty: float
    """Share of answers without text."""
    length: float | None
    """Median of the answer's words over the reference's, of references that have words."""
    repeated: float
    """Mean share of 4-grams that the same answer had before; 0 for answers of fewer than five words."""
    repeating: float
    """Share of answers in which that is at least `REPEATS_FROM`."""
    same_script: float | None
    """Share of answers in the script of their reference, such as Latin or Han, where both have letters."""


def check(
    predictions: Sequence[str], references: Sequence[str], ended: Sequence[bool | None] | None = None
) -> AnswerChecks:
    """Check the answers of a trial.

    Args:
        predictions: one answer a row.
        references: one reference a row.
        ended: whether each answer ended by itself; None where that is not known.

    Raises:
        ValueError: no rows, or unequal numbers of rows.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"need as many references as answers: {len(references)} for {len(predictions)} answers")
    answered = [words(text) if text.strip() else [] for text in predictions]
    expected = [len(words(text)) if text.strip() else 0 for text in references]
    lengths = [len(own) / other for own, other in zip(answered, expected, strict=True) if other]
    scripts = [(script(own), script(other)) for own, other in zip(predictions, references, strict=True)]
    alike = [own == other for own, other in scripts if own is not None and other is not None]
    repeated = [repeated_share(own) for own in answered]
    known = [end for end in ended or () if end is not None]
    return AnswerChecks(
        ended=fmean(known) if known else None,
        empty=fmean(not text.strip() for text in predictions),
        length=median(lengths) if lengths else None,
        repeated=fmean(repeated),
        repeating=fmean(share >= REPEATS_FROM for share in repeated),
        same_script=fmean(alike) if alike else None,
    )


def repeated_share(tokens: Sequence[str]) -> float:
    """Share of a text's 4-grams that it had before, 0 to 1."""
    ngrams = [tuple(tokens[start : start + ORDER]) for start in range(len(tokens) - ORDER + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
