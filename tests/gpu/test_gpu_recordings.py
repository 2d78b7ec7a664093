"""What is recorded on a GPU does what it does unrecorded; what cannot be recorded runs all the same, and says why."""

from __future__ import annotations

import weakref

import pytest

from ray_peft.engine import gpu_peaks
from ray_peft.engine.contract import Computation
from ray_peft.engine.passes import Pass, RecordedPasses
from ray_peft.engine.replays import Replays

pytestmark = pytest.mark.gpu


class Squares(Computation):
    """The mean square of a weight times its inputs; `trouble` is called in each pass."""

    keeps_gradients = True

    def __init__(self, trouble=lambda: None):
        import torch

        self.trouble = trouble
        self.weight = torch.arange(1.0, 9.0, device="cuda").requires_grad_()
        self.weight.grad = torch.zeros_like(self.weight)

    def inputs(self, part):
        import torch

        return [torch.full((part, 8), float(part))]

    def loss(self, inputs):
        self.trouble()
        return (inputs * self.weight).square().mean()


def too_much_memory():
    import torch

    if torch.cuda.is_current_stream_capturing():
        torch.empty(2**45, dtype=torch.uint8, device="cuda")


def waits():
    import torch

    float(torch.ones(1, device="cuda").sum())


def gradients(kind, parts, trouble=lambda: None):
    computation = Squares(trouble)
    passes = kind(computation, "cuda:0")
    for part in parts:
        passes(computation.inputs(part))
    return computation.weight.grad.tolist(), float(passes.loss), passes.how


PARTS = [1, 2, 1, 1, 2, 2, 3, 1, 3, 3]


def test_recorded_passes_of_few_shapes_add_up_what_plain_ones_do():
    plain, loss, _ = gradients(Pass, PARTS)
    recorded, recorded_loss, how = gradients(RecordedPasses, PARTS)
    assert recorded == pytest.approx(plain, rel=1e-6)
    assert recorded_loss == pytest.approx(loss, rel=1e-6)
    assert how == "recorded"


@pytest.mark.parametrize(("trouble", "reason"), [(too_much_memory, "OutOfMemoryError"), (waits, "capturing")])
def test_passes_that_cannot_be_recorded_run_as_they_are_and_later_ones_are_recorded_again(trouble, reason):
    import torch

    plain, loss, _ = gradients(Pass, PARTS)
    unrecorded, unrecorded_loss, how = gradients(RecordedPasses, PARTS, trouble)
    assert unrecorded == pytest.approx(plain, rel=1e-6)
    assert unrecorded_loss == pytest.approx(loss, rel=1e-6)
    assert how.startswith("as they are, since they cannot be recorded")
    assert reason in how
    torch.rand(3, device="cuda")  # random numbers can be drawn, and other passes recorded
    assert gradients(RecordedPasses, PARTS)[2] == "recorded"


def test_divisible_work_without_memory_says_so_and_smaller_work_is_recorded():
    import torch

    replays, total = Replays(records=True), torch.zeros((), device="cuda")

    def large():
        too_much_memory()
        total.add_(1)

    replays("large", large)
    with pytest.raises(torch.OutOfMemoryError):
        replays("large", large)
    for _ in range(4):
        replays("small", lambda: total.add_(10))
    assert float(total) == 41
    assert replays.unrecorded is None


MANY = 2**24
"""Float32 numbers of 64 MiB."""


class Deep:
    """A loss whose backward pass needs much more memory than what stays."""

    def __init__(self):
        import torch

        self.weight = torch.ones(MANY, device="cuda", requires_grad=True)
        self.weight.grad = torch.zeros_like(self.weight)

    def __call__(self):
        value = self.weight
        for _ in range(4):
            value = (value * 1.5).sin()
        value.sum().backward()


def test_passes_aside_and_recorded_ones_share_their_memory_and_leave_none_outside():
    import torch

    torch.cuda.empty_cache()
    work, replays = Deep(), Replays(records=True)
    gpu_peaks.restart()
    for _ in range(3):
        replays("deep", work)
    assert gpu_peaks.reserved() < gpu_peaks.allocated() + 4 * MANY, "less than one tensor too much"
    stream = replays._stream.cuda_stream
    outside = [
        segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment["segment_pool_id"]) == (0, 0) and segment["stream"] == stream
    ]
    assert sum(outside) < 4 * MANY, "the workspace of cuBLAS alone"
    gradient = work.weight.grad.clone()
    work.weight.grad.zero_()
    work()
    assert torch.equal(work.weight.grad * 3, gradient)


def test_the_first_recording_begins_with_a_pool_of_its_own(monkeypatch):
    import torch

    monkeypatch.setattr("ray_peft.engine.replays._pools", weakref.WeakValueDictionary())  # others may still be alive
    replays, large = Replays(records=True), torch.zeros((), device="cuda")

    def cuts_up():
        kept = [torch.ones(2**20 * count, device="cuda").sum() for count in (64, 3, 5, 64)]
        large.add_(sum(kept))

    before = torch.cuda.memory_reserved()
    replays("work", cuts_up)
    first = replays._pool
    replays("work", cuts_up)
    assert replays._pool is not first
    assert torch.cuda.memory_reserved() - before <= 4 * 64 * 2**20 + 2**22
    second = replays._pool
    for _ in range(2):
        replays("other work", cuts_up)
    assert replays._pool is second
    assert float(large) == 4 * 136 * 2**20


def test_what_is_recorded_at_a_time_shares_one_pool_and_one_stream():
    first, second = Replays(records=True), Replays(records=True)
    assert first._pool is second._pool
    assert first._stream is second._stream
    results = [Deep(), Deep()]
    for _ in range(3):
        first("first", results[0])
        second("second", results[1])
    assert results[0].weight.grad.tolist()[:9] == results[1].weight.grad.tolist()[:9]


def test_the_peak_counts_a_replay_beside_what_came_after_the_recording():
    import torch

    work, replays = Deep(), Replays(records=True)
    for _ in range(2):
        replays("deep", work)
    gpu_peaks.restart()
    state = torch.empty(4 * MANY, device="cuda")
    for _ in range(3):
        replays("deep", work)
    assert torch.cuda.max_memory_allocated() < gpu_peaks.allocated()
    assert gpu_peaks.allocated() >= torch.cuda.memory_allocated() + 2 * 4 * MANY
    del state
