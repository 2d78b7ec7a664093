"""Exact match and token F1 of short answers, as SQuAD scores them.

Source: Rajpurkar et al. 2016, SQuAD: 100,000+ questions for machine comprehension of text, EMNLP, D16-1264, and its
evaluation script: lower case, without punctuation, articles and extra space. Scripts without spaces are cut into their
characters, and only words of text in Latin letters lose their articles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from ray_peft.metrics.scripts import loose_words

ARTICLES = frozenset({"a", "an", "the"})


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers whose normalised words are those of the reference, 0 to 1.

    Raises:
        ValueError: no rows, or unequal numbers of rows.
    """
    return fmean(exact_match_rows(predictions, references))


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean over rows of the F1 of normalised words, 0 to 1; errors are those of `exact_match`."""
    return fmean(token_f1_rows(predictions, references))


def exact_match_rows(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """1.0 or 0.0 for each row; errors are those of `exact_match`."""
    return [float(own == other) for own, other in _normalised(predictions, references)]


def token_f1_rows(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """F1 of each row, by how often each word is in both; errors are those of `exact_match`."""
    return [_f1(own, other) for own, other in _normalised(predictions, references)]


def normalised(text: str) -> list[str]:
    """The words that count; those of a text of articles alone are kept, so that "the" is not nothing."""
    tokens = loose_words(text.lower())
    return [token for token in tokens if token not in ARTICLES] or tokens


def _normalised(predictions: Sequence[str], references: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"every answer needs a reference: {len(predictions)} answers, {len(references)} references")
    return [(normalised(own), normalised(other)) for own, other in zip(predictions, references, strict=True)]


def _f1(prediction: list[str], reference: list[str]) -> float:
    if not prediction or not reference:
        return float(prediction == reference)
    common = (Counter(prediction) & Counter(reference)).total()
    return 2 * common / (len(prediction) + len(reference))
