"""How far a score, or the difference of two, could have come from the choice of test rows.

Rows are drawn with replacement and the score is computed again; the interval lies between two percentiles of the
results. Two systems are compared on the same draws. The draws depend only on the seed and the number of rows.

Source: Koehn 2004, Statistical Significance Tests for Machine Translation Evaluation, EMNLP, W04-3250.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from ray_peft.metrics.text_scores import BLEU_COLUMNS, bleu4_from_statistics

# An array of 8 MiB: 1000 resamples over 4000 rows are drawn in 4 blocks.
_COUNTS_AT_ONCE = 2**20


@dataclass(frozen=True, kw_only=True)
class ScoreInterval:
    """A score on all rows, between the ends of its bootstrap interval."""

    score: float
    low: float
    high: float
    confidence: float
    """Share of the resampled scores between `low` and `high`."""
    resamples: int


@dataclass(frozen=True, kw_only=True)
class DifferenceInterval:
    """Score of the first system less that of the second, between the ends of its paired bootstrap interval."""

    difference: float
    low: float
    high: float
    first_better: float
    """Share of the resamples in which the first system scored strictly higher."""
    confidence: float
    """Share of the resampled differences between `low` and `high`."""
    resamples: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """A score on all rows and on each resample: drawn once, compared with any other system on the same rows."""

    score: float
    values: NDArray[np.float64]
    """(resample,)"""


def resampled_bleu4(statistics: NDArray[np.float64], *, resamples: int = 1000, seed: int = 0) -> Resampled:
    """Corpus BLEU-4 on the resamples.

    Args:
        statistics: (row, 10), from `text_scores.bleu_row_statistics`, or their mean over several runs of a system.
        resamples: how often the rows are drawn.
        seed: of the draws.

    Raises:
        ValueError: no rows, another number of columns, or `resamples` out of range.
    """
    _check_statistics(statistics)
    score = float(bleu4_from_statistics(statistics.sum(axis=0)))
    return Resampled(score=score, values=_resampled_bleu4(statistics, resamples, seed))


def resampled_mean(rows: Sequence[float], *, resamples: int = 1000, seed: int = 0) -> Resampled:
    """The mean over rows on the resamples.

    Args:
        rows: one score a row, as from `text_scores.rouge_l_rows`, or its mean over several runs of a system.
        resamples: how often the rows are drawn.
        seed: of the draws.

    Raises:
        ValueError: no rows, a row that is not finite, or `resamples` out of range.
    """
    _check_rows(rows)
    return Resampled(score=fmean(rows), values=_resampled_mean(rows, resamples, seed))


def difference(first: Resampled, second: Resampled, *, confidence: float = 0.95) -> DifferenceInterval:
    """Interval of the difference of two systems whose rows were drawn by the same seed.

    Raises:
        ValueError: unequal numbers of resamples, or `confidence` out of range.
    """
    _check_paired(len(first.values), len(second.values))
    return _difference_interval(first.score - second.score, first.values - second.values, confidence)


def score_interval(resampled: Resampled, *, confidence: float = 0.95) -> ScoreInterval:
    """Interval of one system's score.

    Raises:
        ValueError: `confidence` out of range.
    """
    low, high = _percentiles(resampled.values, confidence)
    return ScoreInterval(
        score=resampled.score, low=low, high=high, confidence=confidence, resamples=len(resampled.values)
    )


def bleu4_interval(
    statistics: NDArray[np.int64], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> ScoreInterval:
    """Interval of corpus BLEU-4, computed anew from the rows of each resample.

    Args:
        statistics: (row, 10), from `text_scores.bleu_row_statistics`.
        confidence: share of the resampled scores that the interval holds, in (0, 1).
        resamples: how often the rows are drawn.
        seed: of the draws.

    Raises:
        ValueError: no rows, another number of columns, or `confidence` or `resamples` out of range.
    """
    _check_statistics(statistics)
    low, high = _percentiles(_resampled_bleu4(statistics, resamples, seed), confidence)
    score = float(bleu4_from_statistics(statistics.sum(axis=0)))
    return ScoreInterval(score=score, low=low, high=high, confidence=confidence, resamples=resamples)


def bleu4_difference(
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> DifferenceInterval:
    """Interval of the difference of two systems in corpus BLEU-4, on the same rows.

    Args:
        first: (row, 10), from `text_scores.bleu_row_statistics`.
        second: (row, 10), in the same order of rows.
        confidence: share of the resampled differences that the interval holds, in (0, 1).
        resamples: how often the rows are drawn.
        seed: of the draws.

    Raises:
        ValueError: no rows, unequal numbers of rows, rows with different reference lengths, another number of columns,
            or `confidence` or `resamples` out of range.
    """
    _check_statistics(first)
    _check_statistics(second)
    _check_paired(len(first), len(second))
    unequal = np.flatnonzero(first[:, -1] != second[:, -1])
    if unequal.size:
        row = int(unequal[0])
        raise ValueError(
            f"both systems must be scored on the same references in the same order, but at row {row} "
            f"the reference has {first[row, -1]} tokens for the first and {second[row, -1]} for the second"
        )
    difference = float(bleu4_from_statistics(first.sum(axis=0)) - bleu4_from_statistics(second.sum(axis=0)))
    resampled = _resampled_bleu4(first, resamples, seed) - _resampled_bleu4(second, resamples, seed)
    return _difference_interval(difference, resampled, confidence)


def mean_interval(
    rows: Sequence[float], *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> ScoreInterval:
    """Interval of a score that is the mean over rows, such as ROUGE-L.

    Args:
        rows: one score a row, as from `text_scores.rouge_l_rows`.
        confidence: share of the resampled means that the interval holds, in (0, 1).
        resamples: how often the rows are drawn.
        seed: of the draws.

    Raises:
        ValueError: no rows, a row that is not finite, or `confidence` or `resamples` out of range.
    """
    _check_rows(rows)
    low, high = _percentiles(_resampled_mean(rows, resamples, seed), confidence)
    return ScoreInterval(score=fmean(rows), low=low, high=high, confidence=confidence, resamples=resamples)


def mean_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> DifferenceInterval:
    """Interval of the difference of two systems in a score that is the mean over rows, such as ROUGE-L.

    Args:
        first: one score a row, as from `text_scores.rouge_l_rows`.
        second: one score a row, in the same order of rows.
        confidence: share of the resampled differences that the interval holds, in (0, 1).
        resamples: how often the rows are drawn.
        seed: of the draws.

    Raises:
        ValueError: no rows, unequal numbers of rows, a row that is not finite, or `confidence` or `resamples` out of
            range.
    """
    _check_rows(first)
    _check_rows(second)
    _check_paired(len(first), len(second))
    # The mean of differences, not the difference of means: exactly zero for identical systems.
    differences = [a - b for a, b in zip(first, second, strict=True)]
    return _difference_interval(fmean(differences), _resampled_mean(differences, resamples, seed), confidence)


def _resampled_bleu4(
    statistics: NDArray[np.int64] | NDArray[np.float64], resamples: int, seed: int
) -> NDArray[np.float64]:
    """(resample,) BLEU-4."""
    # Sums stay exact: they are integers far below 2**53, and float64 goes through BLAS where int64 does not.
    rows = statistics.astype(np.float64)
    return np.concatenate([bleu4_from_statistics(counts @ rows) for counts in _draws(len(rows), resamples, seed)])


def _resampled_mean(rows: Sequence[float], resamples: int, seed: int) -> NDArray[np.float64]:
    """(resample,) mean over rows."""
    values = np.asarray(rows, dtype=np.float64)
    return np.concatenate([counts @ values / len(values) for counts in _draws(len(values), resamples, seed)])


def _draws(rows: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Blocks of (resample, row): how often each resample holds each row."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, found {resamples}")
    generator = np.random.default_rng(seed)
    block = max(1, _COUNTS_AT_ONCE // rows)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = generator.integers(0, rows, size=(size, rows)) + rows * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows).astype(np.float64)


def _difference_interval(difference: float, resampled: NDArray[np.float64], confidence: float) -> DifferenceInterval:
    low, high = _percentiles(resampled, confidence)
    return DifferenceInterval(
        difference=difference,
        low=low,
        high=high,
        first_better=float(np.mean(resampled > 0)),
        confidence=confidence,
        resamples=len(resampled),
    )


def _percentiles(resampled: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """The two ends that leave out equal shares of `resampled`."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, found {confidence}")
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _check_statistics(statistics: NDArray[np.int64] | NDArray[np.float64]) -> None:
    if not len(statistics):
        raise ValueError("a bootstrap needs at least one row, found none")
    if statistics.ndim != 2 or statistics.shape[1] != BLEU_COLUMNS:
        raise ValueError(f"BLEU statistics must have shape (row, {BLEU_COLUMNS}), found {statistics.shape}")


def _check_rows(rows: Sequence[float]) -> None:
    if not len(rows):
        raise ValueError("a bootstrap needs at least one row, found none")
    bad = np.flatnonzero(~np.isfinite(np.asarray(rows, dtype=np.float64)))
    if bad.size:
        raise ValueError(f"every row must be a finite number, row {bad[0]} is {rows[bad[0]]}")


def _check_paired(first: int, second: int) -> None:
    if first != second:
        raise ValueError(f"both systems must be scored on the same rows, found {first} rows and {second} rows")
