"""A trial that is stopped and goes on is the trial that nobody stopped: row, logged points and weights."""

from __future__ import annotations

import pytest
import tiny
from gone_on import CASES, assert_same_trial, attempt, case_spec


@pytest.fixture(scope="module")
def spec_of(request, tiny_model, questions):
    painter, paintings = (request.getfixturevalue(name) for name in ("tiny_painter", "paintings"))
    return lambda case, **changes: case_spec(case, (tiny_model, questions), (painter, paintings), **changes)


@pytest.mark.parametrize("case", CASES)
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
