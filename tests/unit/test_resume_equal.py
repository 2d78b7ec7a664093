"""A trial that is stopped and goes on is the trial that nobody stopped: row, logged points and weights."""

from __future__ import annotations

import pytest
import tiny
from gone_on import CASES, assert_same_points, assert_same_trial, attempt, by_two_workers, case_spec, logged


@pytest.fixture(scope="module")
def spec_of(request, tiny_model, questions):
    painter, paintings = (request.getfixturevalue(name) for name in ("tiny_painter", "paintings"))
    return lambda case, **changes: case_spec(case, (tiny_model, questions), (painter, paintings), **changes)


SHORT = frozenset(
    {
        "lora-dropout",
        "qlora",
        "full-bfloat16",
        "galore-8bit",
        "galore-layerwise",
        "hybrid",
        "images-dropout",
        "images-full",
    }
)
"""Cases that hold what the others hold, too: each kind of weights, of state and of randomness once."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in SHORT else pytest.mark.long) for case in CASES]
)
def test_a_resumed_trial_is_the_undisturbed_one(spec_of, tmp_path, case):
    with tiny.one_thread():
        undisturbed = attempt(spec_of(case), tmp_path / "whole")
        spec = spec_of(case, train__checkpoint_every=3)
        # A hybrid's stages have four and eight steps or so: one stop in each.
        for stop_at in (4, 10):
            with pytest.raises(KeyboardInterrupt):
                attempt(spec, tmp_path / "stopped", stop_at)
        row, points = attempt(spec, tmp_path / "stopped")
    assert row.resumed_from_step == 9
    assert_same_trial(tmp_path / "stopped", row, points, (tmp_path / "whole", *undisturbed))


@pytest.mark.parametrize("case", ["lora-dropout", pytest.param("images-full", marks=pytest.mark.long)])
def test_two_workers_go_on_together(spec_of, tmp_path, case):
    """By time, too: their clocks differ, and each draws its own dropout."""
    spec = spec_of(case, train__checkpoint_every="0.001 s", train__batch_size=8, resources__num_workers=2)
    whole, row = by_two_workers(spec, tmp_path, stop_at=8)
    assert (whole.status, row.status) == ("finished", "finished")
    assert whole.resumed_from_step is None
    assert row.resumed_from_step in (1, 2, 4, 6)  # a logged step, as the time that writing took allows
    assert row.usage.train_tokens == whole.usage.train_tokens
    assert_same_points(logged(tmp_path / "stopped"), logged(tmp_path / "undisturbed"))
    assert row.scores.eval_loss == pytest.approx(whole.scores.eval_loss, rel=1e-6)
