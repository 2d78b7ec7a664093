"""How many rates, steps, rows and seeds fit into a time."""

import pytest

from ray_peft.compare.budget import FEWEST_ROWS, SHAPES, Limits, TooShort, plan, shortened

LIMITS = Limits(steps=2000, validation_rows=250, test_rows=500, answers=True)
METHODS = ["full", "lora"]


def seconds(method, steps, scored, answered):
    """A start of 5 s, a step of 1 s or 2, 0.01 s for a loss and 0.05 for an answer."""
    return 5.0 + {"full": 2.0, "lora": 1.0, "none": 0.0}[method] * steps + 0.01 * scored + 0.05 * answered


def by_hand(found):
    """Seconds of a plan, trial by trial."""
    validation, test = found.validation_rows, found.test_rows
    whole = seconds("none", 0, test, test) + 10.0 * (3 if found.longer else 2)
    for method in METHODS:
        whole += found.rates * seconds(method, found.search_steps, validation, 0)
        whole += found.longer * seconds(method, found.longer_steps, validation, 0)
        whole += found.seeds * seconds(method, found.answer_steps, test, test)
    return whole


@pytest.mark.parametrize("time_s", [400, 900, 3600, 7200, 36_000])
def test_a_plan_fills_its_time_and_no_more(time_s):
    planned = plan(METHODS, seconds, time_s, LIMITS, 10.0)
    assert planned.whole_s == pytest.approx(by_hand(planned))
    assert planned.whole_s <= 0.9 * time_s
    fewest_steps = next(shape for shape in SHAPES if shape.rates == planned.rates and shape.seeds == planned.seeds)
    assert planned.answer_steps >= fewest_steps.enough_steps
    one_more = 2 * 3.0 * planned.seeds + planned.rates * 3.0  # at most: a step more in every trial
    assert planned.whole_s > 0.9 * time_s - one_more * 2 or planned.answer_steps == LIMITS.steps


def test_more_time_gives_more_rates_steps_seeds_and_rows():
    plans = [plan(METHODS, seconds, time_s, LIMITS, 10.0) for time_s in (400, 3600, 36_000)]
    for name in ("rates", "seeds", "answer_steps", "validation_rows", "test_rows"):
        values = [getattr(planned, name) for planned in plans]
        assert values == sorted(values), name
    assert plans[0].test_rows >= FEWEST_ROWS
    assert (plans[-1].validation_rows, plans[-1].test_rows) == (250, 500)


def test_steps_end_at_three_epochs_however_long_the_time():
    assert plan(METHODS, seconds, 1e6, Limits(30, 20, 20, answers=False), 10.0).answer_steps == 30


def test_rungs_double_the_steps_and_the_last_is_the_longest():
    planned = plan(METHODS, seconds, 36_000, LIMITS, 10.0)
    assert planned.longer
    assert planned.search_steps == pytest.approx(planned.answer_steps / 4, abs=1)
    assert planned.longer_steps == pytest.approx(planned.answer_steps / 2, abs=1)


def test_a_time_in_which_nothing_fits_is_refused_with_the_time_that_is_enough():
    with pytest.raises(TooShort) as caught:
        plan(METHODS, seconds, 60, LIMITS, 10.0)
    plan(METHODS, seconds, caught.value.least_s * 1.001, LIMITS, 10.0)
    with pytest.raises(TooShort):
        plan(METHODS, seconds, caught.value.least_s * 0.98, LIMITS, 10.0)


def test_steps_give_way_where_the_rungs_before_took_longer():
    planned = plan(METHODS, seconds, 3600, LIMITS, 10.0)
    assert shortened(planned, planned.answer_s, 1.0) == planned.answer_steps
    assert shortened(planned, planned.answer_s, 0.5) == planned.answer_steps  # faster than predicted adds none
    fewer = shortened(planned, planned.answer_s, 1.5)
    assert 1.5 * (planned.answer_s - (planned.answer_steps - fewer) * planned.answer_step_s) <= planned.answer_s
    assert shortened(planned, 0.0, 1.0) == max(planned.search_steps, planned.longer_steps)
