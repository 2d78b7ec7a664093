"""Which running trials a search ends early: values alone, and the files by which a trial learns of it."""

import json
import threading

import pytest
import tiny

from ray_peft.errors import TrialStopped
from ray_peft.schedule.early import EarlyStopping
from ray_peft.schedule.relay import Relay
from ray_peft.space.search import SearchSpec, scheduler_problem
from ray_peft.spec import TrialSpec
from ray_peft.trial.live import STOP_FILE, Live


def lora(rank=4, **changes):
    method = changes.pop("method", {"name": "lora", "rank": rank})
    return TrialSpec.from_plain(tiny.plain_spec("m/m", "d/d", method, **{"train__eval_every": 2} | changes))


def rule(**settings):
    return EarlyStopping(SearchSpec.from_plain({"scheduler": "asha", **settings}))


def stopped(early, losses, step=2, first_rank=1):
    """The places of those that end, of trials that report these losses at a step, one after the other."""
    words = [early.judge(lora(rank), {"step": step, "eval_loss": loss}) for rank, loss in enumerate(losses, first_rank)]
    return [place for place, word in enumerate(words) if word is not None]


def test_asha_keeps_the_best_part_of_each_rung():
    """Of losses 1, 2, 3 the best half begins at the median, 2; the next rung is at twice the steps."""
    early = rule(reduction=2)
    assert stopped(early, [2.0, 3.0, 1.0, 2.5, 0.5]) == [1, 3]
    assert stopped(early, [9.0], step=3, first_rank=3) == []  # between two rungs
    assert stopped(early, [1.0, 0.9], step=4, first_rank=3) == []
    assert stopped(early, [0.1, 0.95], step=4, first_rank=5) == [1]


def test_no_trial_ends_before_its_grace():
    early = rule(reduction=2, grace_steps=10)
    assert stopped(early, [1.0, 9.0], step=8) == []
    assert stopped(early, [1.0, 9.0], step=10) == [1]


def test_the_median_rule_ends_what_is_above_the_mean_of_most():
    early = rule(scheduler="median")
    assert stopped(early, [1.0, 2.0, 3.0, 2.5, 1.5]) == [3]  # of three others at least, whose median is 2


def test_a_stopped_trial_that_the_user_runs_again_runs_to_its_end():
    for scheduler in ("asha", "median"):
        early = rule(scheduler=scheduler)
        assert stopped(early, [1.0, 1.0, 1.0, 9.0]) == [3]
        assert stopped(early, [9.0], first_rank=4) == []
        assert stopped(early, [9.0], step=4, first_rank=4) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "qlora", "rank": 4}},
        {"model__name": "other/model"},
        {"data__max_length": 64},
        {"evaluation__rows": 2, "evaluation__split": "test"},
    ],
)
def test_losses_are_compared_with_those_of_the_same_question_alone(changes):
    early = rule(reduction=2)
    assert stopped(early, [1.0, 2.0]) == [1]
    assert early.judge(lora(8, **changes), {"step": 2, "eval_loss": 5.0}) is None


def test_a_warm_start_is_compared_with_none():
    early = rule(reduction=2)
    warm = {"trial": "lora-1", "step": 4}
    assert early.judge(lora(train__warm_start=warm), {"step": 2, "eval_loss": 0.1}) is None
    assert stopped(early, [1.0]) == []
    assert early.judge(lora(8, train__warm_start=warm), {"step": 2, "eval_loss": 5.0}) is None


def test_learning_rates_and_steps_do_not_keep_trials_apart():
    early = rule(reduction=2)
    assert stopped(early, [1.0]) == []
    assert early.judge(lora(8, train__steps=50), {"step": 2, "eval_loss": 5.0}) == (
        "stopped after step 2: its held-out loss 5 is not in the best 1/2 of lora trials at this step "
        "(search.scheduler: asha)"
    )


def test_an_earlier_run_of_the_sweep_counts(tmp_path):
    lines = [{"step": 1, "train_loss": 2.0}, {"step": 2, "eval_loss": 1.0}, {"step": 4, "eval_loss": "NaN"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "ev')
    early = rule(reduction=2)
    early.remember([(lora(9), tmp_path), (lora(10), tmp_path / "gone")])
    assert stopped(early, [1.5]) == [0]


BASE = lora(method={"name": "none"}, train__eval_every=None)
ENSEMBLE = {"name": "ensemble", "members": [{"method": {"name": "lora", "rank": 4}}, {"method": {"name": "none"}}]}

VALIDATED = [{"recipe": "prompt_completion", "path": "d/d", "train": 40, "validation": 8, "test": 8}]


@pytest.mark.parametrize(
    ("trials", "says"),
    [
        ([lora(), lora(train__eval_every=None), BASE], "in 1 of 3 trials"),
        ([lora(), lora(resources={"num_workers": 2, "gpus_per_worker": 0})], "needs trials of one worker"),
        ([lora(4, seed=1), lora(8, seed=1), lora(8, seed=2)], "the worse of a setting's seeds"),
        ([lora(method=ENSEMBLE, data__sources=VALIDATED)], "may end a member of an ensemble"),
        ([lora(4), lora(8), BASE], None),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_fairly_is_refused(trials, says):
    problem = scheduler_problem(SearchSpec(scheduler="asha"), trials)
    assert problem is None if says is None else says in problem
    assert scheduler_problem(SearchSpec(samples=2), trials) is None


def test_a_trial_learns_of_it_before_its_last_step(tmp_path):
    live = Live(tmp_path, lora(), "cpu")
    live.steps = 4
    (tmp_path / STOP_FILE).write_text("stopped after step 2: others are better")
    live.log({"eval_loss": 1.0}, 2)
    with pytest.raises(TrialStopped, match="others are better"):
        live.check()
    live.log({"eval_loss": 1.0}, 4)
    live.check()
    live.close()


def test_a_pack_waits_for_the_word_on_a_step(tmp_path):
    relay, done = Relay(tmp_path), threading.Event()
    relay.judged("lora-1", 2)
    relay.wait_until_judged("lora-1", 2)

    def wait():
        relay.wait_until_judged("lora-1", 4)
        done.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not done.wait(0.2)
    relay.judged("lora-1", 4)
    assert done.wait(10)
    thread.join()
