"""Which trials of two units stand beside each other, and what rows and seeds say of them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TypeAlias

import numpy as np

from ray_peft.metrics.intervals import DifferenceInterval, Numbers, ScoreInterval, compare, interval
from ray_peft.metrics.seeds import SeedVariance, seed_variance, together, widened
from ray_peft.report.table import SeedGroup

Trials: TypeAlias = tuple[str, ...]
"""Ids of trials that differ in their seed alone."""


def over_rows_and_seeds(trials: Trials, parts: Callable[[Trials], Numbers]) -> ScoreInterval:
    """Of the mean over the trials, over rows and seeds."""
    estimate = interval(parts(trials))
    return widened(estimate, len(parts(trials)), _of_seeds(trials, parts))


def compared_over_rows(
    pairs: Sequence[tuple[Trials, Trials]], parts: Callable[[Trials], Numbers]
) -> list[DifferenceInterval]:
    """Differences over rows alone; the p-values are corrected for all pairs."""
    return compare([(parts(first), parts(second)) for first, second in pairs])


def compared(pairs: Sequence[tuple[Trials, Trials]], parts: Callable[[Trials], Numbers]) -> list[DifferenceInterval]:
    """Differences over rows and seeds; the p-values are those over rows, corrected for all pairs."""
    differences = compared_over_rows(pairs, parts)
    return [
        widened(difference, len(parts(first)), _of_pair(first, second, parts))
        for difference, (first, second) in zip(differences, pairs, strict=True)
    ]


def _of_pair(first: Trials, second: Trials, parts: Callable[[Trials], Numbers]) -> SeedVariance | None:
    """What seeds add to a difference: pair by pair where both have as many, which holds for equal and other seeds."""
    if len(first) == len(second):
        pairs = zip(first, second, strict=True)
        return seed_variance([fmean(parts((a,))) - fmean(parts((b,))) for a, b in pairs])
    return together([_of_seeds(trials, parts) for trials in (first, second)])


def _of_seeds(trials: Trials, parts: Callable[[Trials], Numbers]) -> SeedVariance | None:
    return seed_variance([fmean(parts((trial,))) for trial in trials])


def mean_of_runs(runs: Sequence[object]) -> Numbers:
    """Over several runs of a system."""
    mean: Numbers = np.mean(np.asarray(runs, dtype=np.float64), axis=0)
    return mean


def trial_pairs(
    members: Sequence[SeedGroup], by_seed: Sequence[Mapping[int, str]]
) -> dict[tuple[int, int], tuple[tuple[str, ...], tuple[str, ...]]]:
    """For every two units, by their places, the trials that stand beside each other.

    Args:
        members: the units.
        by_seed: of each unit, trial ids by seed; at least one.
    """
    pairs = {}
    for first in range(len(members)):
        for second in range(first + 1, len(members)):
            seedless = any(members[place].is_base for place in (first, second))
            pairs[first, second] = _paired_seeds(by_seed[first], by_seed[second], seedless=seedless)
    return pairs


def _paired_seeds(
    first: Mapping[int, str], second: Mapping[int, str], *, seedless: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The trials of the seeds that both have, in the same order; all trials where they share none.

    Args:
        first: trial ids by seed.
        second: the same of the other unit.
        seedless: one of them is the untouched base, which no seed changes: all trials of both.
    """
    shared = [seed for seed in first if seed in second]
    if not shared or seedless:
        return tuple(first.values()), tuple(second.values())
    return tuple(first[seed] for seed in shared), tuple(second[seed] for seed in shared)
