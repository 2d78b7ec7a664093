"""How far a score, or the difference of two, could have come from the choice of test rows.

A score is written as the mean of what its rows add to it. Its interval is Student's t of that mean; two systems are
compared by what they add row by row, with a permutation test: were they equal, each difference could as well have the
other sign. Of several comparisons the p-values are corrected, so that at most one in twenty comparisons of equally good
systems shows any difference at all, however many systems it has.

Measured (benchmarks/coverage.py): percentiles of a bootstrap hold the true difference too rarely below 50 rows, and so
do BCa and studentised bootstraps of differences that are often zero, as those of alike systems are.

Sources: Tukey 1958, Bias and confidence in not quite large samples, Ann. Math. Stat. 29 (what a row adds to BLEU, which
is no mean); Fisher 1935, The Design of Experiments, section 21 (permutation of signs); Holm 1979, A simple sequentially
rejective multiple test procedure, Scand. J. Statist. 6; Dror et al. 2018, ACL, P18-1128 (which test for which score).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from ray_peft.metrics.chrf_scores import CHRF_COLUMNS, chrf_from_statistics
from ray_peft.metrics.text_scores import BLEU_COLUMNS, bleu4_from_statistics

Numbers = NDArray[np.float64]
Statistics = NDArray[np.int64] | Numbers

CONFIDENCE = 0.95
FLIPS = 10_000
"""Drawn flips of the signs; up to `_ALL` rows all flips are looked at."""

_ALL = 13
_ENOUGH = 10
"""Drawn flips beyond the observed difference from which on their share is a p-value."""
_SIGNS_AT_ONCE = 2**23
"""Of signs, 64 MiB: those of 800 rows are drawn once."""


@dataclass(frozen=True, kw_only=True)
class ScoreInterval:
    """A score on all rows, between the ends of its interval."""

    score: float
    low: float
    high: float
    confidence: float
    """How often such an interval holds the score on all rows that there could be."""


@dataclass(frozen=True, kw_only=True)
class DifferenceInterval:
    """Score of the first system less that of the second, between the ends of its interval."""

    difference: float
    low: float
    high: float
    p: float
    """How often equal systems differ by so much; corrected for the comparisons that were made with it."""
    confidence: float
    """How often such an interval, for itself, holds the difference on all rows that there could be."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    @property
    def shown(self) -> bool:
        """Whether the rows show a difference: by the corrected test, and by the interval."""
        return self.excludes_zero and self.p <= 1 - self.confidence


def mean_parts(rows: Sequence[float] | Numbers, weights: Sequence[float] | None = None) -> Numbers:
    """What each row adds to the mean over rows (row,): itself, or with weights its share of the weighted mean.

    Args:
        rows: one score a row.
        weights: of the rows, such as their tokens; None weighs all alike.

    Raises:
        ValueError: no rows, a row that is not finite, or another number of weights.
    """
    values = np.asarray(rows, dtype=np.float64)
    if not len(values):
        raise ValueError("an interval needs at least one row, found none")
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise ValueError(f"every row must be a finite number, row {bad[0]} is {values[bad[0]]}")
    if weights is None:
        return values
    if len(weights) != len(values):
        raise ValueError(f"every row needs a weight, found {len(values)} rows and {len(weights)} weights")
    shares = np.asarray(weights, dtype=np.float64) / fmean(weights)
    mean = fmean(values * shares)
    return mean + shares * (values - mean)


def bleu4_parts(statistics: Statistics) -> Numbers:
    """What each row adds to corpus BLEU-4 (row,): by how much the score changes without it.

    Args:
        statistics: (row, 10), from `text_scores.bleu_row_statistics`, or their mean over several runs of a system.

    Raises:
        ValueError: no rows, or another number of columns.
    """
    return _jackknife(statistics, BLEU_COLUMNS, "BLEU", bleu4_from_statistics)


def chrf_parts(statistics: Statistics) -> Numbers:
    """The same of corpus chrF, from `chrf_scores.chrf_row_statistics`: (row, 18)."""
    return _jackknife(statistics, CHRF_COLUMNS, "chrF", chrf_from_statistics)


def interval(parts: Numbers, *, confidence: float = CONFIDENCE) -> ScoreInterval:
    """Interval of the score whose rows add these parts; of a single row both ends are the score.

    Raises:
        ValueError: `confidence` out of range.
    """
    score, half = fmean(parts), _half_width(parts, confidence)
    return ScoreInterval(score=score, low=score - half, high=score + half, confidence=confidence)


def compare(pairs: Sequence[tuple[Numbers, Numbers]], *, confidence: float = CONFIDENCE) -> list[DifferenceInterval]:
    """Differences of pairs of systems, each pair by the parts of the same rows; p-values are corrected for all pairs.

    Raises:
        ValueError: the systems of a pair have unequal numbers of rows; `confidence` out of range.
    """
    return corrected(pair_differences(pairs, confidence=confidence))


def corrected(differences: Sequence[DifferenceInterval]) -> list[DifferenceInterval]:
    """The differences with p-values that are corrected for the number of them (Holm)."""
    p_values = holm([difference.p for difference in differences])
    return [replace(difference, p=p) for difference, p in zip(differences, p_values, strict=True)]


def pair_differences(
    pairs: Sequence[tuple[Numbers, Numbers]], *, confidence: float = CONFIDENCE
) -> list[DifferenceInterval]:
    """What `compare` says of each pair for itself: p-values are not corrected, so that others can be taken in."""
    for first, second in pairs:
        if len(first) != len(second):
            raise ValueError(
                f"both systems must be scored on the same rows, found {len(first)} rows and {len(second)} rows"
            )
    differences = [first - second for first, second in pairs]
    p_values = [1.0] * len(pairs)
    for rows in {len(values) for values in differences}:
        places = [place for place, values in enumerate(differences) if len(values) == rows]
        for place, p in zip(places, sign_flip_p(np.array([differences[place] for place in places])), strict=True):
            p_values[place] = p
    intervals = []
    for values, p in zip(differences, p_values, strict=True):
        # The mean of differences, not the difference of means: exactly zero for identical systems.
        mean, half = fmean(values), _half_width(values, confidence)
        intervals.append(
            DifferenceInterval(difference=mean, low=mean - half, high=mean + half, p=p, confidence=confidence)
        )
    return intervals


def mean_difference(
    first: Sequence[float], second: Sequence[float], *, confidence: float = CONFIDENCE
) -> DifferenceInterval:
    """Two systems alone, in a score that is the mean over rows, such as ROUGE-L; errors are those of `compare`."""
    return compare([(mean_parts(first), mean_parts(second))], confidence=confidence)[0]


def bleu4_difference(first: Statistics, second: Statistics, *, confidence: float = CONFIDENCE) -> DifferenceInterval:
    """Two systems alone, in corpus BLEU-4, by the row statistics of each.

    Raises:
        ValueError: as `compare`; or the references of a row have different lengths.
    """
    if len(first) == len(second) and (unequal := np.flatnonzero(first[:, -1:] != second[:, -1:])).size:
        row = int(unequal[0])
        raise ValueError(
            f"both systems must be scored on the same references in the same order, but at row {row} "
            f"the reference has {first[row, -1]} tokens for the first and {second[row, -1]} for the second"
        )
    return compare([(bleu4_parts(first), bleu4_parts(second))], confidence=confidence)[0]


def sign_flip_p(differences: Numbers, *, flips: int = FLIPS, seed: int = 0) -> list[float]:
    """For each pair the share of flips of its differences' signs that give a mean at least as far from zero.

    All flips are looked at where at most 13 rows differ; else some are drawn, the same for all pairs. Shares too small
    for the draws are those of Student's t, but never below that of all rows on one side.

    Args:
        differences: (pair, row).
        flips: how many are drawn.
        seed: of the draws.
    """
    if not len(differences):
        return []
    rows = [values[values != 0] for values in differences]
    few = [place for place, values in enumerate(rows) if len(values) <= _ALL]
    many = [place for place, values in enumerate(rows) if len(values) > _ALL]
    p_values = {place: _all_flips(rows[place]) for place in few}
    if many:
        beyond = np.zeros(len(many))
        columns = differences[many].T
        # A flip that gives the same mean in another order of adding up is as far from zero.
        observed = np.abs(columns.sum(axis=0)) * (1 - 1e-9)
        for signs in _signs(len(columns), flips, seed):
            beyond += (np.abs(signs @ columns) >= observed).sum(axis=0)
        for place, count in zip(many, beyond, strict=True):
            drawn = float((count + 1) / (flips + 1))
            p_values[place] = (
                drawn if count >= _ENOUGH else min(drawn, max(_t_p(differences[place]), 0.5 ** (len(rows[place]) - 1)))
            )
    return [p_values[place] for place in range(len(differences))]


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number: those at most 0.05 hold a false one in at most 5 % of the cases."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, greatest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        greatest = max(greatest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = greatest
    return corrected


def _jackknife(statistics: Statistics, columns: int, name: str, score: Callable[[Statistics], Numbers]) -> Numbers:
    """Pseudo-values of a score of sums, shifted so that their mean is the score on all rows."""
    if not len(statistics):
        raise ValueError("an interval needs at least one row, found none")
    if statistics.ndim != 2 or statistics.shape[1] != columns:
        raise ValueError(f"{name} statistics must have shape (row, {columns}), found {statistics.shape}")
    rows = statistics.astype(np.float64)
    total = rows.sum(axis=0)
    without = score(total - rows)
    parts: Numbers = float(score(total)) + (len(rows) - 1) * (without.mean() - without)
    return parts


def _half_width(parts: Numbers, confidence: float) -> float:
    from scipy.special import stdtrit

    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, found {confidence}")
    if len(parts) < 2:
        return 0.0
    return float(stdtrit(len(parts) - 1, (1 + confidence) / 2) * parts.std(ddof=1) / len(parts) ** 0.5)


def _t_p(values: Numbers) -> float:
    """Two-sided p-value of Student's t that the mean is zero."""
    from scipy.special import stdtr

    error = values.std(ddof=1) / len(values) ** 0.5
    return 2 * float(stdtr(len(values) - 1, -abs(values.mean()) / error)) if error else 0.0


def _all_flips(values: Numbers) -> float:
    """The exact share; 1 of no value."""
    signs = 1.0 - 2.0 * ((np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1)
    return float(np.mean(np.abs(signs @ values) >= abs(values.sum()) * (1 - 1e-9)))


def _signs(rows: int, flips: int, seed: int) -> Iterator[Numbers]:
    """Blocks of (flip, row), each sign 1.0 or -1.0."""
    block = max(1, _SIGNS_AT_ONCE // rows)
    if flips <= block:
        yield _drawn_signs(rows, flips, seed)
        return
    generator = np.random.default_rng(seed)
    for start in range(0, flips, block):
        yield _draw(generator, min(block, flips - start), rows)


@lru_cache(maxsize=1)  # of one test set there are many pairs and several scores
def _drawn_signs(rows: int, flips: int, seed: int) -> Numbers:
    """All blocks as one; not to be changed."""
    return _draw(np.random.default_rng(seed), flips, rows)


def _draw(generator: np.random.Generator, flips: int, rows: int) -> Numbers:
    # Doubles, since smaller numbers are drawn several at a time, and blocks would then begin elsewhere.
    return np.where(generator.random((flips, rows)) < 0.5, -1.0, 1.0)
