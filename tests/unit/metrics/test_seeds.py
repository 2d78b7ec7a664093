"""Intervals over rows and seeds: by hand, and how often they hold the truth."""

import numpy as np
import pytest
from scipy.special import stdtrit

from ray_peft.metrics.intervals import interval
from ray_peft.metrics.seeds import SeedVariance, seed_variance, together, widened


def test_one_seed_says_nothing_of_others():
    estimate = interval(np.array([0.1, 0.2, 0.4]))
    assert seed_variance([0.5]) is None
    assert widened(estimate, 3, None) == estimate
    assert together([None, None]) is None


def test_variances_add_up_by_hand():
    estimate = interval(np.array([0.0, 1.0, 0.0, 1.0]))
    of_rows = 1 / 3 / 4  # the variance of the rows over their number
    of_seeds = 0.02 / 2  # that of 0.4 and 0.6 over theirs
    wide = widened(estimate, 4, seed_variance([0.4, 0.6]))
    total = of_rows + of_seeds
    freedom = total**2 / (of_rows**2 / 3 + of_seeds**2 / 1)
    assert wide.high - wide.score == pytest.approx(stdtrit(freedom, 0.975) * total**0.5)
    assert wide.score - wide.low == pytest.approx(wide.high - wide.score)


def test_independent_seeds_add_up():
    both = together([SeedVariance(variance=0.01, freedom=1), None, SeedVariance(variance=0.03, freedom=2)])
    assert both.variance == pytest.approx(0.04)
    assert both.freedom == pytest.approx(0.04**2 / (0.01**2 / 1 + 0.03**2 / 2))


def test_the_interval_holds_the_truth_where_seeds_differ_and_that_over_rows_does_not():
    rng = np.random.default_rng(0)
    rows, seeds, times = 500, 3, 400
    over_rows = over_both = 0
    for _ in range(times):
        scores = (
            rng.normal(0, 0.2, rows)[None] + rng.normal(0, 0.02, seeds)[:, None] + rng.normal(0, 0.1, (seeds, rows))
        )
        estimate = interval(scores.mean(axis=0))
        wide = widened(estimate, rows, seed_variance(scores.mean(axis=1).tolist()))
        over_rows += estimate.low <= 0 <= estimate.high
        over_both += wide.low <= 0 <= wide.high
    assert over_rows / times < 0.88
    assert 0.91 < over_both / times <= 1
