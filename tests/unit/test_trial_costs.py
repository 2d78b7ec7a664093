"""Measurements that need no GPU."""

from __future__ import annotations

import pytest

from ray_peft.errors import TrialFailed
from ray_peft.trial import waiting
from ray_peft.trial.clock import Clock
from ray_peft.trial.peaks import spilled


def test_memory_beyond_the_card_is_spilled():
    assert spilled(14.13, 12.0) == pytest.approx(2.13)  # as in the first study: 14.13 GB on a card of 12
    assert spilled(11.9, 12.0) == 0.0


def test_a_phase_that_raises_is_timed_too():
    clock = Clock()
    with pytest.raises(ValueError, match="broken"), clock.phase("train"):
        raise ValueError("broken")
    assert 0 <= clock.seconds["train"] <= clock.total()


def test_a_trial_waits_until_its_memory_is_free(monkeypatch):
    """Only the answers of the driver are given here: there is no GPU."""
    answers = iter([2, 2, 6])
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (next(answers) * 2**30, 12 * 2**30))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 2**30)
    waiting.wait_for_memory("cuda:0", needed_gib=7.5, context_gib=0.5)
    assert next(answers, None) is None


def test_memory_that_somebody_holds_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(waiting, "FREE_WITHIN_S", 0.0)
    monkeypatch.setattr(waiting, "gpu_holders", lambda: [(4711, 9.5)])
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (2 * 2**30, 12 * 2**30))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 0)
    with pytest.raises(TrialFailed, match=r"needs 8.0 GiB of the GPU, but 2.5 GiB are free .* 4711 \(9.5 GiB\); end"):
        waiting.wait_for_memory("cuda:0", needed_gib=8.0, context_gib=0.5)
