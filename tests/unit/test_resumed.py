"""A trial that was stopped costs what all its attempts took, and its row says where it went on."""

from __future__ import annotations

import json
import logging
import time

import pytest
import tiny
import tiny_diffusion
import torch
from untracked import HYBRID, Notes

from ray_peft.engine import checkpoint
from ray_peft.engine.checkpoint import STATE_FILE
from ray_peft.foundation.seal import seal
from ray_peft.spec import TrialSpec
from ray_peft.trial import trial

SLEEP_S = 1.5


def attempt(spec, folder, *, slow_at=None, stop_at=None):
    """One attempt, which sleeps in one of its steps, and is interrupted in another."""

    def progress(metrics, step):
        if "train_loss" in metrics and step == slow_at:
            time.sleep(SLEEP_S)
        if "train_loss" in metrics and step == stop_at:
            raise KeyboardInterrupt

    return trial.run(spec, trial.Place(folder, "cpu"), Notes(), progress)


@pytest.fixture(params=["llm_sft", "text_to_image"])
def spec(request, questions):
    """A trial of eight steps with a checkpoint after every second one."""
    changes = {"train__steps": 8, "train__checkpoint_every": 2, "train__log_every": 1}
    if request.param == "llm_sft":
        return TrialSpec.from_plain(tiny.plain_spec(request.getfixturevalue("tiny_model"), questions, **changes))
    painter, paintings = (request.getfixturevalue(name) for name in ("tiny_painter", "paintings"))
    return TrialSpec.from_plain(tiny_diffusion.plain_spec(painter, paintings, **changes))


def checkpoint_costs(folder, change):
    """Change the costs that the last checkpoint of a stage holds."""
    place = checkpoint.numbered(folder)[0]
    state = torch.load(place / STATE_FILE, weights_only=True)
    change(state["cost"])
    torch.save(state, place / STATE_FILE)


def test_a_trial_that_is_stopped_twice_costs_all_its_attempts(spec, tmp_path):
    whole = attempt(spec, tmp_path / "whole")
    for slow_at, stop_at in ((1, 4), (4, 7)):
        with pytest.raises(KeyboardInterrupt):
            attempt(spec, tmp_path / "stopped", slow_at=slow_at, stop_at=stop_at)
    checkpoint_costs(tmp_path / "stopped" / "stage1", lambda kept: kept["trial"]["peaks"].update(rss_gib=1234.5))
    again = attempt(spec, tmp_path / "stopped")
    assert (again.status, again.steps, again.resumed_from_step) == ("finished", 8, 6)
    assert again.scores.eval_loss == pytest.approx(whole.scores.eval_loss, rel=1e-4)
    usage = again.usage
    assert (usage.train_tokens, usage.train_images) == (whole.usage.train_tokens, whole.usage.train_images)
    assert usage.train_s > 2 * SLEEP_S
    assert usage.wall_time_s > usage.train_s
    assert usage.steps_per_s < 8 / (2 * SLEEP_S)
    assert usage.peak_rss_gib == 1234.5
    assert usage.complete
    assert whole.resumed_from_step is None
    assert whole.usage.complete


def test_stages_before_a_checkpoint_are_counted_once(tiny_model, questions, tmp_path):
    """Of a trial that goes on in its second stage, both stages' files hold the first one's seconds."""
    plain = tiny.plain_spec(tiny_model, questions, HYBRID, train__steps=8, train__checkpoint_every=2)
    spec = TrialSpec.from_plain(plain)
    with pytest.raises(KeyboardInterrupt):
        attempt(spec, tmp_path, stop_at=7)
    stage = tmp_path / "stage1_adapter" / trial.STAGE_FILE
    kept = json.loads(stage.read_text())
    kept["trial"]["seconds"]["train"] = 1000.0
    stage.write_text(json.dumps(kept))
    seal(stage.parent)
    checkpoint_costs(tmp_path / "stage2", lambda kept: kept["trial"]["seconds"].update(train=1500.0))
    again = attempt(spec, tmp_path)
    assert (again.status, again.resumed_from_step) == ("finished", 6)
    assert 1500 < again.usage.train_s < 1900


def test_a_checkpoint_without_costs_is_gone_on_from_and_the_row_says_so(spec, tmp_path, caplog):
    """Those of version 0.1.0."""
    with pytest.raises(KeyboardInterrupt):
        attempt(spec, tmp_path, stop_at=5)
    place = checkpoint.numbered(tmp_path / "stage1")[0]
    state = torch.load(place / STATE_FILE, weights_only=True)
    del state["cost"]
    torch.save(state, place / STATE_FILE)
    with caplog.at_level(logging.WARNING):
        again = attempt(spec, tmp_path)
    assert (again.status, again.resumed_from_step, again.usage.complete) == ("finished", 4, False)
    assert "does not say what the steps before it took" in caplog.text
