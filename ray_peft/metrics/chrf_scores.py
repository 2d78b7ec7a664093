"""Corpus chrF of texts, with what each row adds to it: the same for every script, since it knows characters only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from ray_peft.metrics.text_scores import Reference, row_pairs

CHRF_ORDERS = 6
"""chrF counts n-grams of 1 to 6 characters, white space left out."""

CHRF_COLUMNS = 3 * CHRF_ORDERS
"""Columns of a chrF statistics array: for each order n-grams of the prediction, of the reference, and in both."""

_RECALL = 2**2
"""Recall weighs twice as much as precision: chrF2."""


def chrf(predictions: Sequence[str], references: Sequence[Reference]) -> float:
    """Corpus chrF2 in [0, 1]; equal to sacrebleu's, divided by 100.

    Raises:
        ValueError: no rows, unequal numbers of rows, or a row without a reference.

    Source: Popovic 2015, chrF: character n-gram F-score for automatic MT evaluation, W15-3049.
    """
    return float(chrf_from_statistics(chrf_row_statistics(predictions, references).sum(axis=0)))


def chrf_row_statistics(predictions: Sequence[str], references: Sequence[Reference]) -> NDArray[np.int64]:
    """What each row adds to corpus chrF; of several references the one with the best score of the row alone.

    Returns:
        (row, 18) int64: for orders 1 to 6 n-grams of the prediction, of the reference, and in both.

    Raises:
        ValueError: no rows, unequal numbers of rows, or a row without a reference.
    """
    rows = []
    for prediction, texts in row_pairs(predictions, references):
        several = np.array([_statistics(prediction, text) for text in texts], dtype=np.int64)
        rows.append(several[int(np.argmax(chrf_from_statistics(several)))])
    return np.stack(rows)


def chrf_from_statistics(statistics: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float64]:
    """chrF2 in [0, 1] of corpora given by their summed statistics.

    Args:
        statistics: (..., 18), sums over rows of `chrf_row_statistics`.

    Returns:
        (...) float64; the mean over the orders that both sides have, 0 where nothing matches.
    """
    predicted, expected, matched = (np.asarray(statistics[..., part::3], dtype=np.float64) for part in range(3))
    defined = (predicted > 0) & (expected > 0)
    orders = np.maximum(defined.sum(axis=-1), 1)
    precision = np.divide(matched, predicted, out=np.zeros_like(matched), where=defined).sum(axis=-1) / orders
    recall = np.divide(matched, expected, out=np.zeros_like(matched), where=defined).sum(axis=-1) / orders
    below = _RECALL * precision + recall
    scores: NDArray[np.float64] = np.zeros_like(below)
    np.divide((1 + _RECALL) * precision * recall, below, out=scores, where=below > 0)
    return scores


def _statistics(prediction: str, reference: str) -> list[int]:
    expected, sizes = _reference_ngrams(reference)
    predicted = _ngrams(prediction)
    matched = [0] * CHRF_ORDERS
    for ngram in predicted.keys() & expected.keys():
        matched[len(ngram) - 1] += min(predicted[ngram], expected[ngram])
    length = len("".join(prediction.split()))
    # As sacrebleu: an order that the reference does not have counts no n-gram of the prediction either.
    predicted_sizes = [max(0, length - order) if size else 0 for order, size in enumerate(sizes)]
    return list(chain.from_iterable(zip(predicted_sizes, sizes, matched, strict=True)))


@lru_cache(maxsize=1024)  # the trials of a sweep answer the same rows
def _reference_ngrams(reference: str) -> tuple[Counter[str], tuple[int, ...]]:
    """N-grams of a reference, and how many of each order; not to be changed."""
    length = len("".join(reference.split()))
    return _ngrams(reference), tuple(max(0, length - order) for order in range(CHRF_ORDERS))


def _ngrams(text: str) -> Counter[str]:
    """How often each n-gram of 1 to 6 characters occurs."""
    text = "".join(text.split())
    return Counter(
        text[start : start + order] for order in range(1, CHRF_ORDERS + 1) for start in range(len(text) - order + 1)
    )
