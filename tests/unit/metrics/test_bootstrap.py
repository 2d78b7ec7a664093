"""Paired bootstrap: exact small cases, an independent slow version, and how often the interval holds the truth."""

import dataclasses
import json
import random

import numpy as np
import pytest

from ray_peft.metrics import bootstrap
from ray_peft.metrics.bootstrap import (
    DifferenceInterval,
    ScoreInterval,
    bleu4_difference,
    bleu4_interval,
    mean_difference,
    mean_interval,
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

INTERVALS = [(bleu4_interval, GOOD), (mean_interval, HIGH)]
DIFFERENCES = [(bleu4_difference, GOOD, BAD), (mean_difference, HIGH, LOW)]


@pytest.mark.parametrize(("interval", "rows"), INTERVALS)
def test_the_score_lies_in_its_interval(interval, rows):
    found = interval(rows)
    assert found.low < found.score < found.high
    assert (found.confidence, found.resamples) == (0.95, 1000)


def test_the_score_is_the_score_of_all_rows():
    assert bleu4_interval(GOOD).score == bleu4(*corpus(150, 0.2, 1))
    assert mean_interval([0.1, 0.2, 0.6]).score == pytest.approx(0.3)


@pytest.mark.parametrize(("difference", "first", "second"), DIFFERENCES)
def test_a_system_does_not_differ_from_itself(difference, first, second):
    same = difference(first, first.copy())
    assert (same.difference, same.low, same.high, same.first_better) == (0.0, 0.0, 0.0, 0.0)
    assert not same.excludes_zero


@pytest.mark.parametrize(("difference", "first", "second"), DIFFERENCES)
def test_a_clearly_better_system_excludes_zero(difference, first, second):
    better, worse = difference(first, second), difference(second, first)
    assert 0 < better.low < better.difference < better.high
    assert better.excludes_zero
    assert worse.excludes_zero
    assert (better.first_better, worse.first_better) == (1.0, 0.0)
    assert (worse.difference, worse.low, worse.high) == pytest.approx(
        (-better.difference, -better.high, -better.low), abs=1e-15
    )


def test_equally_good_systems_do_not_exclude_zero():
    found = bleu4_difference(GOOD, OTHER_GOOD)
    assert not found.excludes_zero
    assert 0 < found.first_better < 1


def test_pairing_removes_what_the_systems_share():
    paired = mean_difference(HIGH, LOW)
    alone = mean_interval(HIGH)
    assert paired.high - paired.low < alone.high - alone.low


@pytest.mark.parametrize(("interval", "rows"), INTERVALS)
def test_the_seed_decides_the_interval(interval, rows):
    assert interval(rows, seed=5) == interval(rows, seed=5)
    assert interval(rows, seed=5) != interval(rows, seed=6)


@pytest.mark.parametrize(("interval", "rows"), INTERVALS)
def test_drawing_in_blocks_changes_nothing(interval, rows, monkeypatch):
    at_once = interval(rows)
    monkeypatch.setattr(bootstrap, "_COUNTS_AT_ONCE", 7 * len(rows))
    in_blocks = interval(rows)
    assert (in_blocks.low, in_blocks.high) == pytest.approx((at_once.low, at_once.high), abs=1e-12)


def test_the_global_generator_is_left_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    bleu4_interval(GOOD, resamples=10)
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize(("interval", "rows"), INTERVALS)
def test_more_confidence_is_a_wider_interval(interval, rows):
    narrow, wide = interval(rows, confidence=0.5), interval(rows, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_one_row_has_an_interval_without_width():
    one = bleu4_interval(GOOD[:1])
    assert one.low == one.high == one.score
    assert mean_interval([0.25]) == ScoreInterval(score=0.25, low=0.25, high=0.25, confidence=0.95, resamples=1000)


def test_two_rows_have_three_possible_resamples():
    # Means 0, 1/2 and 1 with chances 1/4, 1/2 and 1/4: the middle 40 % of the draws are all 1/2.
    wide, narrow = mean_interval([0.0, 1.0]), mean_interval([0.0, 1.0], confidence=0.4)
    assert (wide.low, wide.high) == (0.0, 1.0)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_bleu4_interval_agrees_with_scoring_resampled_texts():
    predictions, references = corpus(20, 0.2, 1)
    rng = random.Random(9)
    scores = []
    for _ in range(300):
        rows = rng.choices(range(20), k=20)
        scores.append(bleu4([predictions[i] for i in rows], [references[i] for i in rows]))
    found = bleu4_interval(bleu_row_statistics(predictions, references), resamples=5000)
    low, high = np.quantile(scores, [0.025, 0.975])
    width = high - low
    assert found.low == pytest.approx(low, abs=0.15 * width)
    assert found.high == pytest.approx(high, abs=0.15 * width)


def test_mean_interval_agrees_with_the_normal_interval():
    rows = np.random.default_rng(0).normal(0.5, 0.1, 400)
    found = mean_interval(rows.tolist(), resamples=5000)
    half = 1.96 * rows.std() / 400**0.5
    assert found.low == pytest.approx(rows.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(rows.mean() + half, abs=0.1 * half)


def test_about_95_of_100_intervals_hold_the_true_difference():
    generator = np.random.default_rng(0)
    held = 0
    for seed in range(400):
        shared = generator.normal(0.5, 0.2, 60)
        first, second = shared + generator.normal(0.05, 0.1, 60), shared + generator.normal(0.0, 0.1, 60)
        found = mean_difference(first.tolist(), second.tolist(), resamples=400, seed=seed)
        held += found.low <= 0.05 <= found.high
    assert 0.90 <= held / 400 <= 0.98


def test_intervals_are_frozen_and_become_json():
    found = bleu4_difference(GOOD, BAD)
    assert DifferenceInterval(**json.loads(json.dumps(dataclasses.asdict(found)))) == found
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.low = 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bleu4_interval(GOOD[:0]), "at least one row, found none"),
        (lambda: mean_interval([]), "at least one row, found none"),
        (lambda: bleu4_difference(GOOD[:0], GOOD[:0]), "at least one row, found none"),
        (lambda: mean_difference([], []), "at least one row, found none"),
        (lambda: bleu4_difference(GOOD, BAD[:-1]), "found 150 rows and 149 rows"),
        (lambda: mean_difference([0.1, 0.2], [0.1]), "found 2 rows and 1 rows"),
        (lambda: bleu4_difference(GOOD, BAD[::-1]), "at row 0 the reference has"),
        (lambda: bleu4_interval(GOOD[:, :8]), r"shape \(row, 10\), found \(150, 8\)"),
        (lambda: mean_interval([0.1, float("nan")]), "row 1 is nan"),
        (lambda: mean_interval(HIGH, confidence=95), "between 0 and 1, found 95"),
        (lambda: mean_interval(HIGH, resamples=0), "at least 1, found 0"),
    ],
)
def test_what_cannot_be_resampled_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_resampling_once_gives_the_intervals_of_each_pair():
    first, second = statistics(60, 0.2, 1), statistics(60, 0.3, 2)
    second[:, -1] = first[:, -1]
    resampled = [bootstrap.resampled_bleu4(each) for each in (first, second)]
    assert bootstrap.difference(*resampled) == bootstrap.bleu4_difference(first, second)
    assert bootstrap.score_interval(resampled[0]) == bootstrap.bleu4_interval(first)
    # The mean of several equal runs is the same system.
    twice = bootstrap.resampled_bleu4(np.mean([first, first], axis=0))
    assert bootstrap.difference(twice, resampled[0]).high == 0
    rows = [random.Random(seed).choices([0.0, 0.5, 1.0], k=60) for seed in (1, 2)]
    found = bootstrap.difference(*(bootstrap.resampled_mean(each) for each in rows))
    wanted = bootstrap.mean_difference(*rows)
    assert (found.difference, found.low, found.high) == pytest.approx((wanted.difference, wanted.low, wanted.high))
    with pytest.raises(ValueError, match="same rows"):
        bootstrap.difference(resampled[0], bootstrap.resampled_bleu4(second, resamples=10))
