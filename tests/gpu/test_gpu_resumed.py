"""On a GPU, too, a trial that is stopped and goes on is the undisturbed one, in passes that are recorded anew."""

from __future__ import annotations

import pytest
from gone_on import CASES, assert_same_trial, attempt, case_spec

pytestmark = pytest.mark.gpu


@pytest.fixture
def deterministic(monkeypatch):
    """Convolutions and sums whose order does not change: two undisturbed trials of a UNet differ in the last bit."""
    import torch

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    efficient = torch.backends.cuda.mem_efficient_sdp_enabled()
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward pass adds up in any order
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_trial_is_the_undisturbed_one(
    exact, deterministic, tiny_model, questions, tiny_painter, paintings, tmp_path, case
):
    data = ((tiny_model, questions), (tiny_painter, paintings))
    undisturbed = attempt(case_spec(case, *data), tmp_path / "whole", device="cuda:0")
    spec = case_spec(case, *data, train__checkpoint_every=3)
    with pytest.raises(KeyboardInterrupt):
        attempt(spec, tmp_path / "stopped", 10, device="cuda:0")
    row, points = attempt(spec, tmp_path / "stopped", device="cuda:0")
    assert row.resumed_from_step == 9
    assert_same_trial(tmp_path / "stopped", row, points, (tmp_path / "whole", *undisturbed))
