"""One stage's optimizer steps: pass the rows, update, log, evaluate, keep checkpoints; go on where memory runs out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Generic

from ray_peft.engine import checkpoint
from ray_peft.engine.contract import Computation, PartT, Rows
from ray_peft.engine.member import Member
from ray_peft.engine.passes import Pass
from ray_peft.engine.recovery import free_memory, is_out_of_memory
from ray_peft.engine.trained import Trained
from ray_peft.engine.workers import add_up, add_up_gradients, this_worker
from ray_peft.spec.keys import MICRO_BATCH

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)


class Engine(Generic[PartT]):
    """Trains one member on one model.

    Where memory runs out in a pass, the step is done again from its first row, with half as many rows a pass: each
    pass's loss is its share of the step's, so batch, order, losses and updates stay what they are. With dropout, the
    draws from there on are others. Workers cannot do so (the others would wait for the further passes), nor can a
    stage that updates weights in the backward pass.
    """

    def __init__(
        self,
        member: Member,
        model: nn.Module,
        rows: Rows[PartT],
        computation: Computation[PartT],
        make_pass: Callable[[Computation[PartT], str], Pass[PartT]] = Pass,
        *,
        rehearse: bool = False,
    ) -> None:
        """Prepare to train, from the last checkpoint where there is one.

        Args:
            member: the trial's stage.
            model: with the stage attached; its mode is set to training, and to evaluation at the end.
            rows: what each step sees.
            computation: what a pass computes.
            make_pass: how passes run.
            rehearse: try the pass that needs the most memory before the first steps.
        """
        self._member, self._job = member, member.job
        self._model, self._data, self._computation, self._make_pass = model, rows, computation, make_pass
        self._share = this_worker()
        self._repeats = self._share.workers == 1 and not self._job.stage.conflicts(accumulates=True, num_workers=1)
        asked = self._job.spec.train.micro_batch_size
        most = min(asked, self._job.lowered.get(MICRO_BATCH, asked)) if self._repeats else asked
        self._rows = rows.fitting(most, self._share)
        self._accumulates = self._job.spec.accumulation > 1
        self._pass = make_pass(computation, self._job.device)
        self._passing = 0
        """Rows of the pass that is running, or ran last."""
        self._rehearsals = 2 if rehearse and self._share.workers == 1 else 0
        self._begin = 0.0

    def run(self) -> Trained:
        """Train for the stage's steps; returns what they took."""
        member, job = self._member, self._job
        self._resume()
        first = member.done
        self._wait()
        self._model.train()
        self._begin = time.perf_counter()
        for step in range(first, job.steps):
            if step - first < self._rehearsals and job.steps - first > 1:
                self._rehearse(range(first, job.steps), with_state=step > first)
            self._step(step)
        member.guard.check()  # waits for the last step
        member.trained = replace(self._so_far(), passes=self._pass.how)
        self._model.eval()
        member.end()
        return member.trained

    def _step(self, step: int) -> None:
        member, job, train = self._member, self._job, self._job.spec.train
        number = job.first_step + step
        before = self._pass.loss.clone()
        self._fitting(lambda: self._pass_all(number), before, number)
        if self._share.workers > 1:
            add_up_gradients(member.parameters)
        norm, rate = member.end_step(self._pass.loss, keep_gradients=self._computation.keeps_gradients)
        seen = self._data.seen(number)
        member.trained.tokens += seen.tokens
        member.trained.images += seen.images
        if member.logs():
            self._log(norm, rate)
        if train.eval_every and member.done % train.eval_every == 0 and member.done < job.steps:
            begin = time.perf_counter()
            member.evaluate()
            self._model.train()
            self._begin += time.perf_counter() - begin
        if train.checkpoint_every and member.done % train.checkpoint_every == 0 and member.done < job.steps:
            self._save()

    def _pass_all(self, number: int) -> None:
        """Add the gradients and the loss of this worker's rows of a step."""
        for part in self._data.parts(number, self._share, self._rows):
            self._passing = self._data.size(part)
            self._pass(part)

    def _fitting(self, work: Callable[[], None], loss: Tensor, number: int) -> None:
        """Do `work`, again from `loss` and without gradients with fewer rows a pass while memory runs out."""
        while True:
            try:
                work()
                return
            except RuntimeError as error:
                if not self._repeats or self._passing < 2 or not is_out_of_memory(error):
                    raise
            self._lower(loss, number)

    def _lower(self, loss: Tensor, number: int) -> None:
        self._wait()  # what is replayed belongs to a recorded pass
        self._member.optimizer.zero_grad(set_to_none=True)
        del self._pass
        free_memory(self._job.device)
        self._rows = self._job.lowered[MICRO_BATCH] = self._data.fitting(self._passing // 2, self._share)
        self._accumulates = True
        self._pass = self._make_pass(self._computation, self._job.device)
        self._pass.loss.copy_(loss)
        logger.warning(
            "a pass of %d rows ran out of memory at step %d; going on with %d rows a pass",
            self._passing, number + 1, self._rows,
        )  # fmt: skip

    def _rehearse(self, steps: range, *, with_state: bool) -> None:
        """Try the heaviest pass of the steps to come, before the first and, with the optimizer's state, the second.

        Gradients, the loss and random numbers are then as if it had not been.
        """
        import torch

        first = self._job.first_step
        numbers = range(first + steps.start, first + steps.stop)
        self._wait()
        begin, loss = time.perf_counter(), self._pass.loss.clone()
        devices = [torch.cuda.current_device()] if self._job.device.startswith("cuda") else []

        def heaviest() -> None:
            part = self._data.heaviest(numbers, self._share, self._rows)
            if part is None:
                return
            self._passing = self._data.size(part)
            if not self._repeats:  # a backward pass would update weights
                self._pass.forward_alone(part)
                return
            # If a step has several passes, the second meets the gradients of the first; or it is recorded.
            for _ in range(2 if (with_state and self._accumulates) or self._computation.keeps_gradients else 1):
                self._pass(part)

        with torch.random.fork_rng(devices):
            self._fitting(heaviest, loss, first + self._member.done)
        self._member.optimizer.zero_grad(set_to_none=not self._computation.keeps_gradients)
        self._pass.loss.copy_(loss)
        self._wait()
        self._begin += time.perf_counter() - begin

    def _log(self, norm: Tensor, rate: float) -> None:
        member = self._member
        member.guard.check()
        if self._share.workers > 1:
            add_up(self._pass.loss)
        loss = float(self._pass.loss)
        self._pass.loss.zero_()
        member.log(loss, norm, rate, self._data.epoch(self._job.first_step + member.done))

    def _so_far(self) -> Trained:
        """The stage up to now, over all attempts."""
        trained = self._member.trained
        return replace(trained, seconds=trained.seconds + time.perf_counter() - self._begin)

    def _save(self) -> None:
        self._member.guard.check()
        loss = self._pass.loss.clone()
        if self._share.workers > 1:
            add_up(loss)
        if self._share.rank > 0:
            return
        state = self._member.state(self._so_far()) | {
            "loss": loss,
            "random": checkpoint.random_state(self._job.device),
        }
        checkpoint.write(self._job.folder, self._member.done, state)

    def _resume(self) -> None:
        last = checkpoint.read_last(self._job.folder, self._job.device)
        if last is None:
            return
        where, state = last
        self._member.take_up(state, where)
        if "loss" in state and self._share.rank == 0:  # not in version 0.1.0
            self._pass.loss.copy_(state["loss"])
        if "random" in state:
            checkpoint.draw_from(state["random"], self._job.device)

    def _wait(self) -> None:
        """For the GPU to be done, so that seconds belong to what took them."""
        if self._job.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()
