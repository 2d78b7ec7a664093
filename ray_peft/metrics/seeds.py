"""How far a mean over seeds could have come from the choice of seeds, beside that of test rows.

Seeds and rows are crossed: every seed's model answers the same rows. The variance of the mean over both is that of the
rows' means over seeds, divided by the rows, plus that of the seeds' means over rows, divided by the seeds; what belongs
to neither alone is counted in both, which makes the interval a little wide and never narrow. Student's t has the
degrees of freedom of a sum of two variances.

Sources: Owen 2007, The pigeonhole bootstrap, Ann. Appl. Stat. 1 (variances of crossed random effects); Satterthwaite
1946, An approximate distribution of estimates of variance components, Biometrics Bulletin 2 (degrees of freedom).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance
from typing import TypeVar

from ray_peft.metrics.intervals import DifferenceInterval, ScoreInterval

IntervalT = TypeVar("IntervalT", ScoreInterval, DifferenceInterval)


@dataclass(frozen=True, kw_only=True)
class SeedVariance:
    """The variance of a mean over seeds that comes from the seeds."""

    variance: float
    freedom: float
    """Degrees of freedom."""


def seed_variance(scores: Sequence[float]) -> SeedVariance | None:
    """Of a mean over seeds, or of paired differences of seeds; None for fewer than two, which say nothing of others."""
    if len(scores) < 2:
        return None
    return SeedVariance(variance=variance(scores) / len(scores), freedom=len(scores) - 1)


def together(parts: Sequence[SeedVariance | None]) -> SeedVariance | None:
    """Of a sum or difference of means over independent seeds; None if no part is known."""
    known = [part for part in parts if part is not None]
    total = sum(part.variance for part in known)
    if not known:
        return None
    return SeedVariance(variance=total, freedom=_freedom([(part.variance, part.freedom) for part in known]))


def widened(interval: IntervalT, rows: int, seeds: SeedVariance | None) -> IntervalT:
    """The interval over rows as one over rows and seeds; as it is where nothing is known of other seeds.

    Args:
        interval: over so many rows.
        rows: behind it.
        seeds: what the seeds add.
    """
    from scipy.special import stdtrit

    if seeds is None or not seeds.variance or rows < 2:
        return interval
    middle, quantile = (interval.low + interval.high) / 2, (1 + interval.confidence) / 2
    of_rows = ((interval.high - middle) / float(stdtrit(rows - 1, quantile))) ** 2
    freedom = _freedom([(of_rows, rows - 1), (seeds.variance, seeds.freedom)])
    half = float(stdtrit(freedom, quantile)) * (of_rows + seeds.variance) ** 0.5
    return replace(interval, low=middle - half, high=middle + half)


def _freedom(parts: Sequence[tuple[float, float]]) -> float:
    """Of a sum of variances, each with its degrees of freedom."""
    total = sum(variance for variance, _ in parts)
    if not total:
        return fmean(freedom for _, freedom in parts)
    return total**2 / sum(variance**2 / freedom for variance, freedom in parts)
