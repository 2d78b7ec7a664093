"""Where memory runs out, training goes on with fewer rows a pass, and nothing else changes."""

from __future__ import annotations

import pytest
import tiny_diffusion
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from ray_peft.methods.optimizers import trainable
from ray_peft.spec import TrialSpec
from ray_peft.tasks.text_to_image.passes import unwrapped
from ray_peft.tasks.text_to_image.task import TextToImage

LORA = {"name": "lora", "rank": 4, "lr": 0.01}
FULL = {"name": "full", "lr": 0.002, "weights": "float32"}
ROWS = "train.micro_batch_size"


class Run:
    """A trial whose passes are watched: `check` is given the rows of each, on its way forward, or else back."""

    def __init__(self, spec, folder, *, check=None, backward=False, lowered=None):
        self.bench, self.log, self.passes, self.updates = TextToImage().load(spec, "cpu"), [], [], 0
        self.bench.lowered |= lowered or {}
        self.held, self.alive = None, []
        ((stage, steps),) = spec.method.stages(self.bench.total_steps())
        self.bench.attach(stage)

        def see(module, args, output):
            self.passes.append(len(output))
            self.alive.append(self.held is not None and not self.held.expired())
            self.held = StorageWeakRef(args[0].untyped_storage())  # kept for the backward pass
            if check is not None and not backward:
                check(self, len(output))
            elif check is not None and output.requires_grad:
                output.register_hook(lambda gradient: check(self, len(gradient)))

        unwrapped(self.bench.model).mid_block.register_forward_hook(see)
        counter = register_optimizer_step_post_hook(self._count)
        try:
            self.outcome = self.bench.train(stage, steps, 0, folder, lambda metrics, _: self.log.append(metrics))
        finally:
            counter.remove()

    def _count(self, optimizer, args, kwargs):
        self.updates += 1


@pytest.fixture(scope="module")
def train(tiny_painter, paintings, tmp_path_factory):
    """Trains one trial of three steps of six rows."""

    def run(method=LORA, *, check=None, backward=False, lowered=None, **changes):
        sizes = {"train__steps": 3, "train__batch_size": 6, "train__micro_batch_size": 6, "train__log_every": 3}
        plain = tiny_diffusion.plain_spec(tiny_painter, paintings, dict(method), **sizes | changes)
        folder = tmp_path_factory.mktemp("run")
        return Run(TrialSpec.from_plain(plain), folder, check=check, backward=backward, lowered=lowered)

    return run


@pytest.fixture(scope="module")
def undisturbed(train):
    """Passes of the rows that others end with: rounding moves weights whose gradient is next to none."""
    cells = ((LORA, 3), (LORA, 1), (FULL, 3))
    return {(method["name"], rows): train(method, train__micro_batch_size=rows) for method, rows in cells}


def no_more_than(rows):
    """Memory for so many rows in a pass."""

    def check(run, passed):
        if passed > rows:
            raise torch.OutOfMemoryError(f"no room for {passed} rows")

    return check


def at_pass(*numbers):
    """Memory that runs out in these passes, from 1."""

    def check(run, passed):
        if len(run.passes) in numbers:
            assert any(parameter.grad is not None for parameter in trainable(run.bench.model))
            raise torch.OutOfMemoryError(f"no room for {passed} rows")

    return check


def same_training(found, wanted):
    assert len(found.log) == len(wanted.log) == 2
    for ours, theirs in zip(found.log, wanted.log, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert found.outcome.images == wanted.outcome.images
    weights = zip(trainable(found.bench.model), trainable(wanted.bench.model), strict=True)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in weights)


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_a_step_that_runs_out_of_memory_is_done_again_in_smaller_passes_and_changes_nothing(train, undisturbed, method):
    """In the backward pass of the second pass of the third step: gradients and the loss of two steps are there."""
    found = train(method, check=at_pass(6), backward=True, train__micro_batch_size=3)
    assert found.bench.lowered == {ROWS: 1}
    assert found.passes == [*[3] * 6, *[1] * 6]
    assert found.updates == 3
    same_training(found, undisturbed[method["name"], 3])


def test_rows_are_lowered_until_they_fit(train, undisturbed):
    found = train(check=no_more_than(2))
    assert found.passes == [6, 3, *[1] * 18]  # two rows would leave the fewer to a last pass of another shape
    assert found.bench.lowered == {ROWS: 1}
    same_training(found, undisturbed["lora", 1])


def test_what_the_failed_pass_held_is_free_when_it_is_done_again(train):
    def check(run, passed):
        if len(run.passes) == 2:
            assert not run.held.expired()
            raise torch.OutOfMemoryError("no room")

    found = train(FULL, check=check, backward=True)
    assert found.bench.lowered == {ROWS: 3}
    assert not any(found.alive)


def test_a_later_stage_starts_with_the_rows_that_fit(train, undisturbed):
    found = train(lowered={ROWS: 3})
    assert found.passes == [3] * 6
    same_training(found, undisturbed["lora", 3])


def test_a_single_row_that_does_not_fit_ends_the_trial(train):
    seen = []

    def check(run, passed):
        seen.append(passed)
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        train(check=check)
    assert seen == [6, 3, 1]


def test_other_errors_end_the_trial(train):
    def check(run, passed):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="do not match"):
        train(check=check)
