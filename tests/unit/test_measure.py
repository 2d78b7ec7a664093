"""Measurements that need no GPU."""

from __future__ import annotations

import pytest

from ray_peft.measure import Clock, spilled


def test_memory_beyond_the_card_is_spilled():
    assert spilled(14.13, 12.0) == pytest.approx(2.13)  # as in the first study: 14.13 GB on a card of 12
    assert spilled(11.9, 12.0) == 0.0


def test_a_phase_that_raises_is_timed_too():
    clock = Clock()
    with pytest.raises(ValueError, match="broken"), clock.phase("train"):
        raise ValueError("broken")
    assert 0 <= clock.seconds["train"] <= clock.total()
