"""Optimizer steps on one base: passes, updates, logs, evaluations, checkpoints, and recovery where memory runs out."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic

from ray_peft.engine import checkpoint, stopping
from ray_peft.engine.ahead import Ahead
from ray_peft.engine.contract import Computation, PartT, Rows
from ray_peft.engine.crew import Alone, Crew
from ray_peft.engine.member import Member
from ray_peft.engine.passes import Pass
from ray_peft.engine.random_state import draw_from, random_state
from ray_peft.engine.recovery import free_memory, is_out_of_memory, out_of_memory
from ray_peft.engine.shards import is_sharded, whole
from ray_peft.engine.workers import Agreement, add_up, add_up_gradients, from_all, from_first, this_worker
from ray_peft.errors import StorageError
from ray_peft.spec.keys import MICRO_BATCH

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)


class Engine(Generic[PartT]):
    """Trains members on one base: in each round, every member does one optimizer step.

    Where memory runs out in a pass, the round is done again from its first row, with half as many rows a pass: each
    pass's loss is its share of the step's, so batch, order, losses and updates stay what they are. Of several workers,
    all do it if one ran out. A stage that updates weights in the backward pass cannot do so, nor can workers that hold
    parts of one model: the others wait inside of the pass for what this one has.
    """

    def __init__(
        self,
        members: Sequence[Member],
        model: nn.Module,
        rows: Rows[PartT],
        computation: Computation[PartT],
        make_pass: Callable[[Computation[PartT], str], Pass[PartT]] = Pass,
        *,
        rehearse: bool = False,
        crew: Crew | None = None,
    ) -> None:
        """Prepare to train.

        Args:
            members: who trains at first; a trial alone is one member.
            model: with the stage attached; its mode is set to training, and to evaluation at the end.
            rows: what each round sees; of one member, each of its steps.
            computation: what a pass computes.
            make_pass: how passes run.
            rehearse: try the pass that needs the most memory before the first rounds.
            crew: who follows a member that ends; None is for one member.
        """
        self._members, self._crew = list(members), crew or Alone()
        jobs = [member.job for member in members]
        self._device, self._lowered = jobs[0].device, jobs[0].lowered
        self._model, self._data, self._computation, self._make_pass = model, rows, computation, make_pass
        self._share, self._sharded = this_worker(), is_sharded(model)
        self._repeats = not self._sharded and not any(job.stage.updates_in_backward for job in jobs)
        self._agreed = Agreement() if self._repeats and self._share.workers > 1 else None
        self._configured_rows = sum(job.spec.train.micro_batch_size for job in jobs)
        self._rows = self._rows_a_pass()
        self._accumulates = any(job.spec.accumulation > 1 for job in jobs)
        self._pass = make_pass(computation, self._device)
        self._first_pass = True
        """Nothing has run through `_pass` yet."""
        self._ahead = Ahead(rows, computation, self._share)
        self._passing = 0
        """Rows of the pass that is running, or ran last."""
        self._rehearsals = 2 if rehearse and self._share.workers == 1 else 0
        self._counted = 0.0
        """The moment up to which training seconds have been counted [s]."""

    def _rows_a_pass(self) -> int:
        """Rows of a pass: as many as the trials' settings say, or as few as memory has allowed so far."""
        rows = self._configured_rows
        if self._repeats:
            rows = min(rows, self._lowered.get(MICRO_BATCH, rows))
        return self._data.fitting(rows, self._share)

    def run(self) -> None:
        """Train every member for its steps, from its last checkpoint where there is one."""
        starting, self._members = self._members, []
        for member in starting:
            self._resume(member)
        first = number = starting[0].number
        to_come = range(first, first + max(member.left for member in starting))
        self._wait()
        self._model.train()
        self._counted = time.perf_counter()
        for member in starting:
            self._take_in(member, number)
        while self._members:
            if number - first < self._rehearsals and len(to_come) > 1:
                self._rehearse(to_come, with_state=number > first)
            self._round(number)
            number += 1
        self._model.eval()

    def _take_in(self, member: Member | None, number: int) -> None:
        """Let a member, which has been resumed from its last checkpoint, start in round `number`."""
        if member is None:
            return
        self._members.append(member)
        member.due.start()
        self._crew.seat(member, number)
        try:
            if self._share.rank == 0:
                member.check_disk()
        except StorageError as error:
            self._leave(member, number, error)
            return
        if not member.left:
            self._end([member], number)

    def _round(self, number: int) -> None:
        before = self._pass.loss.clone()
        self._fitting(lambda: self._pass_all(number), before, number)
        if all(member.left > 1 for member in self._members):  # else others may be there by then
            self._ahead.prepare(number + 1, self._rows)
        self._count_time()
        if self._share.workers > 1:
            add_up_gradients([parameter for member in self._members for parameter in member.parameters])
        members = self._members.copy()
        for member in members:
            try:
                self._end_step(member)
            except Exception as error:  # of this member's own part; the crew knows whether the others go on
                self._leave(member, number + 1, error)
        evaluated = [member for member in members if member in self._members and member.evaluates()]
        self._end([member for member in self._members if not member.left], number + 1)
        self._take_verdicts(evaluated, number + 1)
        self._stop_if_told()

    def _take_verdicts(self, evaluated: Sequence[Member], number: int) -> None:
        """End those of the members, before round `number`, that whoever compares trials wants to end."""
        if not evaluated:
            return
        self._count_time()
        for member in evaluated:
            try:
                member.job.verdict(member.number)
            except Exception as error:  # it ends; the others go on
                self._leave(member, number, error)
        self._counted = time.perf_counter()

    def _stop_if_told(self) -> None:
        """Write every member's checkpoint and end, if this process was told to stop.

        Raises:
            Stopped: it was.
        """
        stop_now = stopping.is_told()
        if self._share.workers > 1 and self._members:  # all workers, at the same step
            stop_now = self._members[0].logs() and from_first(stop_now, self._device)
        if not stop_now or not self._members:
            return
        for member in self._members:
            self._count_time()
            if member.due.ever and checkpoint.last_step(member.job.folder) != member.steps_done:
                with member.job.costs.saving():
                    self._save(member)
        raise stopping.Stopped

    def _end_step(self, member: Member) -> None:
        norm, rate = member.end_step(member.own(self._pass.loss), keep_gradients=self._computation.keeps_gradients)
        logged = member.logs()
        if logged:
            self._log(member, norm, rate)
        if member.evaluates():
            self._count_time()
            member.evaluate()
            self._model.train()
            self._counted = time.perf_counter()
        if member.due.after(member.steps_done, member.job.steps, logged=logged):
            self._count_time()
            with member.job.costs.saving():
                self._save(member)
            member.due.written()
            self._counted = time.perf_counter()

    def _end(self, members: Sequence[Member], number: int) -> None:
        """Members have done all their steps before round `number`."""
        if not members:
            return
        errors: dict[Member, Exception] = {}
        for member in members:
            try:
                member.guard.check()  # waits for the last step
            except Exception as failure:
                errors[member] = failure
        self._count_time()
        finished = [member for member in members if member not in errors]
        for member in finished:
            member.trained.passes = self._pass.how
            member.end()
        if finished:
            self._crew.finished(finished)
        self._counted = time.perf_counter()
        for member in members:
            self._leave(member, number, errors.get(member))

    def _leave(self, member: Member, number: int, error: Exception | None) -> None:
        self._count_time()
        self._ahead.forget()
        self._members.remove(member)
        following = self._crew.leave(member, error)
        self._model.train()
        if following is not None:
            self._resume(following)
            self._take_in(following, number)
        self._counted = time.perf_counter()

    def _pass_all(self, number: int) -> None:
        """Add the gradients and the losses of this worker's rows of a round."""
        for part, inputs in self._ahead.take(number, self._rows):
            self._run_pass(part, inputs)
        if self._sharded:
            for inputs in self._ahead.beside(number, self._rows):
                self._pass.idle(inputs)

    def _run_pass(self, part: PartT, inputs: Sequence[Tensor]) -> None:
        first, self._first_pass = self._first_pass, False
        self._passing = self._data.size(part)
        with contextlib.ExitStack() as stack:
            if first and self._computation.keeps_gradients:
                # They stay, so they must not lie scattered over the memory that recorded passes use again and again.
                for member in self._members:
                    stack.enter_context(member.with_gradients())
            self._pass(inputs)

    def _fitting(self, work: Callable[[], None], loss: Tensor, number: int) -> None:
        """Do `work`. While memory runs out, reset the losses and gradients, and repeat with fewer rows a pass."""
        while True:
            rows = self._rows
            try:
                work()
            except RuntimeError as error:
                if not self._repeats or not is_out_of_memory(error) or (self._passing < 2 and self._agreed is None):
                    raise
                rows = self._passing // 2
            if self._agreed is not None:
                rows = self._agreed.least(rows)
            if rows == self._rows:
                return
            if not rows:
                raise out_of_memory("a worker ran out of memory with one row a pass")
            self._lower(rows, loss, number)

    def _lower(self, rows: int, loss: Tensor, number: int) -> None:
        self._wait()  # a recorded pass may still be replaying in memory that is freed here
        for member in self._members:
            member.clear_gradients(keep=member.slot is not None)
        del self._pass
        free_memory(self._device)
        self._rows = self._lowered[MICRO_BATCH] = self._data.fitting(rows, self._share)
        self._accumulates = True
        self._pass = self._make_pass(self._computation, self._device)
        self._first_pass = True
        self._pass.loss.copy_(loss)
        logger.warning(
            "a pass of %d rows ran out of memory at step %d; going on with %d rows a pass",
            self._passing, number + 1, self._rows,
        )  # fmt: skip

    def _rehearse(self, rounds: range, *, with_state: bool) -> None:
        """Try the heaviest pass of the rounds to come, before the first and, with the optimizers' state, the second.

        It leaves gradients, losses and random numbers as they were.
        """
        import torch

        self._wait()
        self._count_time()
        loss = self._pass.loss.clone()
        devices = [torch.cuda.current_device()] if self._device.startswith("cuda") else []

        def heaviest() -> None:
            part = self._data.heaviest(rounds, self._rows)
            if part is None:
                return
            inputs = self._computation.inputs(part)
            if not self._repeats:  # a backward pass would update weights
                self._pass.forward_alone(inputs)
                return
            # If a step has several passes, the second meets the gradients of the first; or it is recorded.
            for _ in range(2 if (with_state and self._accumulates) or self._computation.keeps_gradients else 1):
                self._run_pass(part, inputs)

        with torch.random.fork_rng(devices):
            self._fitting(heaviest, loss, rounds.start + with_state)
        for member in self._members:
            member.clear_gradients(keep=self._computation.keeps_gradients)
        self._pass.loss.copy_(loss)
        self._wait()
        self._counted = time.perf_counter()

    def _log(self, member: Member, norm: Tensor, rate: float) -> None:
        member.guard.check()
        loss = member.own(self._pass.loss)
        if self._share.workers > 1:
            add_up(loss)
        mean = float(loss)
        loss.zero_()
        member.log(mean, norm, rate)

    def _count_time(self) -> None:
        """Divide the seconds since the last count among the members, by the tokens or images of each one's step."""
        now = time.perf_counter()
        weights = [member.weight() for member in self._members]
        for member, weight in zip(self._members, weights, strict=True):
            member.trained.seconds += (now - self._counted) * (weight / sum(weights) if len(weights) > 1 else 1.0)
            member.job.costs.trained_for(member.trained.seconds)
        self._counted = now

    def _save(self, member: Member) -> None:
        member.guard.check()
        loss = member.own(self._pass.loss).clone()
        if self._share.workers > 1:
            add_up(loss)
        random = random_state(self._device)
        states = from_all(random) if self._share.workers > 1 else [random]
        state = whole(member.state(), keep=self._share.rank == 0) | {"loss": loss, "random": states}
        if self._share.rank > 0:
            return
        if member.slot is None:
            state["lowered"] = dict(self._lowered)
        checkpoint.write(member.job.folder, member.steps_done, state)

    def _resume(self, member: Member) -> None:
        last = checkpoint.read_last(member.job.folder)
        own = member.own(self._pass.loss)
        own.zero_()
        if last is None:
            return
        where, state = last
        member.restore(state, where)
        if "loss" in state and self._share.rank == 0:  # not in version 0.1.0
            own.copy_(state["loss"])
        if member.slot is None:
            self._lowered.update(state.get("lowered", {}))
            self._rows = self._rows_a_pass()
        states = state.get("random")
        if isinstance(states, dict):  # of version 0.1.0, from the first worker alone
            states = [states]
        if states:
            draw_from(states[min(self._share.rank, len(states) - 1)], self._device)

    def _wait(self) -> None:
        """Wait until the GPU is idle, so that its seconds are counted where they were spent."""
        if self._device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()
