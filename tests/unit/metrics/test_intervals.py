"""Intervals and tests of differences: exact small cases, independent slow versions, and how often they are right."""

import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
from scipy import stats

from ray_peft.metrics import intervals
from ray_peft.metrics.chrf_scores import chrf, chrf_row_statistics
from ray_peft.metrics.intervals import (
    DifferenceInterval,
    bleu4_difference,
    bleu4_parts,
    chrf_parts,
    compare,
    holm,
    interval,
    mean_difference,
    mean_parts,
    sign_flip_p,
)
from ray_peft.metrics.text_scores import bleu4, bleu_row_statistics

WORDS = [f"w{i}" for i in range(50)]


def corpus(rows: int, changed: float, seed: int) -> tuple[list[str], list[str]]:
    """Predictions in which each word of the reference is replaced with probability `changed`, and the references."""
    rng = random.Random(0)
    references = [rng.choices(WORDS, k=rng.randrange(8, 20)) for _ in range(rows)]
    rng = random.Random(seed)
    predictions = [[rng.choice(WORDS) if rng.random() < changed else word for word in text] for text in references]
    return [" ".join(text) for text in predictions], [" ".join(text) for text in references]


def statistics(rows: int, changed: float, seed: int) -> np.ndarray:
    return bleu_row_statistics(*corpus(rows, changed, seed))


GOOD, OTHER_GOOD, BAD = statistics(150, 0.2, 1), statistics(150, 0.2, 2), statistics(150, 0.35, 3)
HIGH = np.random.default_rng(0).uniform(0.4, 0.9, 150).tolist()
LOW = (np.array(HIGH) - np.random.default_rng(1).uniform(-0.1, 0.2, 150)).tolist()
DIFFERENCES = [(bleu4_difference, GOOD, BAD), (mean_difference, HIGH, LOW)]


def test_parts_have_the_score_as_their_mean():
    predictions, references = corpus(150, 0.2, 1)
    assert interval(bleu4_parts(GOOD)).score == pytest.approx(bleu4(predictions, references), abs=1e-12)
    found = interval(chrf_parts(chrf_row_statistics(predictions, references)))
    assert found.score == pytest.approx(chrf(predictions, references), abs=1e-12)
    assert interval(mean_parts([0.1, 0.2, 0.6])).score == pytest.approx(0.3)
    assert interval(mean_parts([1.0, 2.0, 5.0], [1, 1, 2])).score == pytest.approx((1 + 2 + 10) / 4)


def test_the_interval_of_a_mean_is_students():
    rows = np.random.default_rng(0).normal(0.5, 0.1, 12)
    expected = stats.t.interval(0.95, 11, loc=rows.mean(), scale=stats.sem(rows))
    found = interval(mean_parts(rows))
    assert (found.low, found.high) == pytest.approx(expected, rel=1e-12)
    narrow = interval(mean_parts(rows), confidence=0.5)
    assert found.low < narrow.low < narrow.high < found.high


def test_weights_give_the_interval_of_a_ratio():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 60, 200)
    losses = rng.gamma(4.0, 0.5, 200)
    found = interval(mean_parts(losses, tokens.tolist()))
    drawn = rng.integers(0, 200, (4000, 200))
    ratios = (losses * tokens)[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)
    assert found.high - found.low == pytest.approx(2 * 1.972 * ratios.std(), rel=0.05)


def test_the_interval_of_bleu_is_as_wide_as_scores_of_drawn_texts_say():
    predictions, references = corpus(40, 0.2, 1)
    rng = random.Random(9)
    scores = []
    for _ in range(400):
        rows = rng.choices(range(40), k=40)
        scores.append(bleu4([predictions[i] for i in rows], [references[i] for i in rows]))
    found = interval(bleu4_parts(bleu_row_statistics(predictions, references)))
    assert found.high - found.low == pytest.approx(2 * 2.023 * float(np.std(scores)), rel=0.15)


@pytest.mark.parametrize(("difference", "first", "second"), DIFFERENCES)
def test_a_system_does_not_differ_from_itself(difference, first, second):
    same = difference(first, first.copy())
    assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    assert not same.shown


@pytest.mark.parametrize(("difference", "first", "second"), DIFFERENCES)
def test_a_clearly_better_system_is_shown(difference, first, second):
    better, worse = difference(first, second), difference(second, first)
    assert 0 < better.low < better.difference < better.high
    assert better.shown
    assert worse.shown
    assert (worse.difference, worse.low, worse.high) == pytest.approx(
        (-better.difference, -better.high, -better.low), abs=1e-15
    )
    assert better.p == worse.p < 1e-4


def test_equally_good_systems_are_not_told_apart():
    found = bleu4_difference(GOOD, OTHER_GOOD)
    assert not found.shown
    assert found.low < 0 < found.high


def test_pairing_removes_what_the_systems_share():
    paired, alone = mean_difference(HIGH, LOW), interval(mean_parts(HIGH))
    assert paired.high - paired.low < alone.high - alone.low


def test_few_rows_are_flipped_in_all_ways():
    values = np.array([0.3, 0.1, -0.05, 0.0, 0.2, 0.4, 0.02, -0.1])
    flipped = [abs(np.dot(signs, values)) for signs in itertools.product((1, -1), repeat=8)]
    expected = np.mean([each >= abs(values.sum()) - 1e-12 for each in flipped])
    assert sign_flip_p(values[None]) == [pytest.approx(expected, abs=1e-12)]
    # Of n rows that all favour one system, 2 of 2**n flips are as far: zeros say nothing.
    assert sign_flip_p(np.array([[1.0] * 5, [1.0] * 3 + [0.0] * 2, [0.0] * 5])) == [2 / 32, 2 / 8, 1.0]


def test_drawn_flips_agree_with_scipy_and_do_not_depend_on_blocks(monkeypatch):
    rng = np.random.default_rng(3)
    values = rng.normal(0.25, 1, (3, 40))
    found = sign_flip_p(values)
    for row, p in zip(values, found, strict=True):
        expected = stats.permutation_test(
            (row,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(1)
        ).pvalue
        assert p == pytest.approx(expected, abs=0.015)
    monkeypatch.setattr(intervals, "_SIGNS_AT_ONCE", 40 * 7)
    assert sign_flip_p(values) == found


def test_tiny_p_values_go_below_what_is_drawn_but_not_below_what_is_possible():
    rng = np.random.default_rng(0)
    clear = rng.normal(1, 0.5, (1, 200))
    assert 0 < sign_flip_p(clear)[0] < 1e-10
    assert sign_flip_p(np.ones((1, 20)))[0] == 2 / 2**20


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_more_pairs_make_each_difference_harder_to_show():
    rng = np.random.default_rng(1)
    first = rng.normal(0.5, 0.2, 60)
    second = first - rng.normal(0.07, 0.2, 60)
    alone = compare([(first, second)])[0]
    assert 0.005 < alone.p < 0.04  # else the test could not fail
    assert alone.shown
    noise = [(first, first + rng.normal(0, 0.2, 60)) for _ in range(9)]
    among = compare([(first, second), *noise])[0]
    assert among.p == pytest.approx(10 * alone.p)
    assert (among.low, among.high) == (alone.low, alone.high)
    assert among.excludes_zero
    assert not among.shown
    assert compare([]) == []


@pytest.mark.parametrize("rows", [8, 16, 50])
def test_intervals_hold_the_truth_and_equal_systems_are_rarely_told_apart(rows):
    # Scores as ROUGE-L has them: shared difficulty, some rows at 0 and some at 1. benchmarks/coverage.py does more.
    rng = np.random.default_rng(rows)
    times, inside, false = 600, 0, 0
    for _ in range(times):
        hard = rng.beta(1.2, 3, rows)
        first, second = (np.clip(hard + rng.normal(0, 0.15, rows), 0, 1) for _ in range(2))
        for system in (first, second):
            system[rng.random(rows) < 0.25] = 0
            system[rng.random(rows) < 0.08] = 1
        found = compare([(first, second)])[0]
        inside += found.low <= 0 <= found.high
        false += found.shown
    assert 0.93 <= inside / times <= 0.985
    assert false / times <= 0.07


def test_one_row_has_an_interval_without_width_and_shows_nothing():
    one = interval(mean_parts([0.25]))
    assert (one.low, one.high) == (0.25, 0.25)
    assert interval(bleu4_parts(GOOD[:1])).low == float(bleu4(*(texts[:1] for texts in corpus(150, 0.2, 1))))
    assert not mean_difference([1.0], [0.0]).shown


def test_the_global_generator_is_left_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    mean_difference(HIGH, LOW)
    assert (np.random.get_state()[1] == before).all()


def test_differences_are_frozen_and_become_json():
    found = bleu4_difference(GOOD, BAD)
    assert DifferenceInterval(**json.loads(json.dumps(dataclasses.asdict(found)))) == found
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.low = 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bleu4_parts(GOOD[:0]), "at least one row, found none"),
        (lambda: mean_parts([]), "at least one row, found none"),
        (lambda: mean_difference([], []), "at least one row, found none"),
        (lambda: bleu4_difference(GOOD, BAD[:-1]), "found 150 rows and 149 rows"),
        (lambda: mean_difference([0.1, 0.2], [0.1]), "found 2 rows and 1 rows"),
        (lambda: bleu4_difference(GOOD, BAD[::-1]), "at row 0 the reference has"),
        (lambda: bleu4_parts(GOOD[:, :8]), r"shape \(row, 10\), found \(150, 8\)"),
        (lambda: chrf_parts(GOOD), r"chrF statistics must have shape \(row, 18\), found \(150, 10\)"),
        (lambda: mean_parts([0.1, float("nan")]), "row 1 is nan"),
        (lambda: mean_parts([0.1, 0.2], [1]), "found 2 rows and 1 weights"),
        (lambda: interval(mean_parts(HIGH), confidence=95), "between 0 and 1, found 95"),
    ],
)
def test_what_has_no_interval_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
