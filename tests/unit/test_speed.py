"""How long a trial takes: what is measured of it, and what that predicts of others."""

import pytest
import tiny
from untracked import HYBRID, run

from ray_peft.spec import TrialSpec
from ray_peft.tasks.base import Workload
from ray_peft.trial import speed
from ray_peft.trial.result import TrialResult, Usage

GENERATE = {"generate": True, "rows": 4, "max_new_tokens": 8, "batch_size": 2}


def spec(method=None, **changes):
    return TrialSpec.from_plain(tiny.plain_spec("some/model", "rows.jsonl", method, **changes))


def result(trial, *, steps, wall_s, evaluate_s):
    usage = Usage(wall_time_s=wall_s, evaluate_s=evaluate_s)
    return TrialResult(trial_id=trial.trial_id, status="finished", spec=trial, steps=steps, usage=usage)


def losses(*times, first=1):
    return [(step, time_s, {"train_loss": 1.0}) for step, time_s in enumerate(times, first)]


def test_a_step_is_the_median_after_the_first_and_the_rest_is_what_is_left():
    points = losses(5.0, 6.0, 7.0, 9.5, 10.5)  # the first step took long, and a checkpoint was written once
    measured = speed.measured(
        result(spec(), steps=5, wall_s=16.0, evaluate_s=4.0), points, Workload(50.0, scored_rows=8, answered_rows=4)
    )
    assert measured is not None
    assert (measured.step_s, measured.timed) == (1.0, 4)
    assert measured.rest_s == pytest.approx(16.0 - 4.0 - 5 * 1.0)
    of_losses = 8 * 1.0 / 8 / 3  # a third of a training pass for each of eight rows
    assert measured.answers_s == pytest.approx(4.0 - of_losses)


def test_evaluations_in_between_are_no_part_of_a_step_and_measure_the_loss_of_a_row():
    points = [*losses(5.0, 6.0), (2, 8.0, {"eval_loss": 1.0}), *losses(9.0, 10.0, first=3), (4, 14.0, {"eval_loss": 1})]
    trial = spec(evaluation__generate=False)
    measured = speed.measured(result(trial, steps=4, wall_s=14.0, evaluate_s=4.0), points, Workload(50.0, 8))
    assert measured is not None
    assert measured.step_s == 1.0
    assert measured.scored_row_s == 2.0 / 8
    assert measured.rest_s == pytest.approx(14.0 - 4.0 - 4 * 1.0 - 2.0)


def test_stages_are_weighed_by_their_steps():
    trial = spec(HYBRID)
    points = losses(1.0, 2.0, 3.0, 4.0, 9.0, 12.0, 15.0, 18.0)  # of eight steps the last four take 3 s
    measured = speed.measured(result(trial, steps=8, wall_s=20.0, evaluate_s=1.0), points, Workload(50.0, 8))
    assert measured is not None
    assert measured.step_s == pytest.approx((4 * 1.0 + 4 * 3.0) / 8)


@pytest.mark.parametrize(
    "changes",
    [{"status": "failed"}, {"resumed_from_step": 2}, {"restarts": ["killed"]}],
    ids=lambda changes: next(iter(changes)),
)
def test_trials_that_did_not_run_in_one_go_measure_nothing(changes):
    whole = result(spec(), steps=4, wall_s=9.0, evaluate_s=1.0)
    points = losses(1.0, 2.0, 3.0, 4.0)
    assert speed.measured(whole, points, Workload(50.0, 8)) is not None
    assert speed.measured(whole.model_copy(update=changes), points, Workload(50.0, 8)) is None


def test_a_prediction_grows_with_steps_lengths_rows_and_answers():
    known = speed.Speed(
        step_s=1.0, row_tokens=50.0, rest_s=7.0, scored_row_s=0.1, answers_s=3.0, answered_rows=4, new_tokens=8,
        answered_at_once=2,
    )  # fmt: skip
    trial = spec(train__steps=10)
    cpu = speed.predicted(trial, known, Workload(100.0, 16, 8), 10, on_gpu=False)
    assert cpu == pytest.approx({"step_s": 2.0, "evaluate_s": 16 * 0.2 + 6.0, "wall_time_s": 7.0 + 20.0 + 9.2})
    # Four at a time: two rounds, as in what was measured.
    gpu = speed.predicted(trial, known, Workload(50.0, 16, 8), 10, on_gpu=True)
    assert gpu["evaluate_s"] == pytest.approx(16 * 0.1 + 3.0)
    assert speed.predicted(trial, known, Workload(101.0, 16, 8), 10, on_gpu=False) == {}  # never measured so long
    assert speed.predicted(trial, None, Workload(50.0, 16, 8), 10, on_gpu=False) == {}
    loss_alone = known.model_copy(update={"answers_s": None})
    assert speed.predicted(trial, loss_alone, Workload(50.0, 16, 8), 10, on_gpu=False) == {}


def test_rates_and_steps_are_no_part_of_a_shape_and_the_rest_is():
    first = speed.key(spec(), "model", "a CPU, 2 threads")
    same = [spec({"name": "lora", "rank": 4, "lr": 0.5}), spec(train__steps=40), spec(seed=3)]
    other = [spec({"name": "lora", "rank": 8}), spec(train__batch_size=4), spec(model__dtype="bfloat16")]
    assert {speed.key(trial, "model", "a CPU, 2 threads") for trial in same} == {first}
    assert first not in {speed.key(trial, "model", "a CPU, 2 threads") for trial in other}
    assert first != speed.key(spec(), "model", "a CPU, 1 threads")
    assert first != speed.key(spec(), "another model", "a CPU, 2 threads")


def test_fewer_times_do_not_take_the_place_of_more(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_PEFT_CACHE", str(tmp_path))
    answered = {"answers_s": 3.0, "answered_rows": 4, "new_tokens": 8}
    speed.remember("a", speed.Speed(step_s=1.0, row_tokens=50.0, rest_s=1.0, timed=4, **answered))
    speed.remember("a", speed.Speed(step_s=9.0, row_tokens=50.0, rest_s=1.0, timed=2))
    remembered = speed.read("a")
    assert remembered is not None
    assert (remembered.step_s, remembered.answers_s) == (1.0, 3.0)
    speed.remember("a", speed.Speed(step_s=2.0, row_tokens=50.0, rest_s=8.0, timed=30))
    remembered = speed.read("a")
    assert remembered is not None
    assert (remembered.step_s, remembered.answers_s) == (2.0, 3.0)
    assert remembered.rest_s == 1.0  # the later one imported libraries, too
    (tmp_path / "speed" / "a.json").write_text("{")
    assert speed.read("a") is None


def test_a_trial_is_predicted_from_the_one_before_it(tiny_model, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_PEFT_CACHE", str(tmp_path / "cache"))
    trial = TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions, train__steps=6))
    before, _ = run(trial, tmp_path / "first")
    assert before.predicted_s == {}
    longer = trial.changed({"train.steps": 12, "method.lr": 0.003})
    after, _ = run(longer, tmp_path / "second")
    assert set(after.predicted_s) == {"step_s", "evaluate_s", "wall_time_s"}
    assert 0.1 < after.predicted_s["wall_time_s"] / after.usage.wall_time_s < 10
