"""One trial in the process that trains it: its parameters, optimizer, schedule, counts and guard."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ray_peft.engine import checkpoint, cost, disk
from ray_peft.engine.contract import Rows
from ray_peft.engine.due import Due
from ray_peft.engine.finite import FiniteGuard
from ray_peft.engine.shards import is_spread, spread_state
from ray_peft.engine.trained import Costs, Report, Trained
from ray_peft.methods.base import Stage
from ray_peft.methods.optimizers import keeps_gradient, trainable
from ray_peft.spec import TrialSpec

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Job:
    """One stage of one trial: what trains, for how long, and where it is kept."""

    spec: TrialSpec
    stage: Stage
    steps: int
    first_step: int
    """Optimizer steps that earlier stages of the trial have done."""
    folder: Path
    """Keeps the stage's checkpoints."""
    device: str
    report: Report
    evaluate: Callable[[], float]
    """The loss on the held-out rows, of the model as it is."""
    lowered: dict[str, int] = field(default_factory=dict)
    """Settings that were lowered in earlier stages because memory ran out. This stage starts with them, and adds to
    them (`Bench.lowered`)."""
    costs: Costs = field(default_factory=Costs)
    """Of the trial; checkpoints carry them."""
    verdict: Callable[[int], None] = lambda step: None
    """Called with a step of the trial after which it was evaluated, once all members have done their steps; waits until
    whoever compares trials has compared it, and raises if it is to end."""
    logs_last: bool = False
    """Log the last step even if it is no multiple of `train.log_every`."""


class Member:
    """A trial's part of the loop. It waits for the GPU only where it logs or writes a checkpoint."""

    slot: int | None = None
    """Its index in the losses of several members; None for a member that has the base to itself."""

    def __init__(self, job: Job, model: nn.Module, rows: Rows[Any], average: Any = None) -> None:
        """Prepare a stage for its first step.

        Args:
            job: the stage.
            model: with the stage attached.
            rows: what its steps see.
            average: diffusers' EMAModel over the trained parameters; None without one.
        """
        from transformers import get_scheduler

        self.job, self.rows = job, rows
        self.parameters = trainable(model)
        self.optimizer = job.stage.optimizer(model)
        train = job.spec.train
        self.rates = get_scheduler(
            train.schedule if train.schedule != "constant" else "constant_with_warmup",
            self.optimizer,
            num_warmup_steps=train.warmup_steps or math.ceil(train.warmup_ratio * job.steps),
            num_training_steps=job.steps,
        )
        self.average = average
        self.due = Due(train.checkpoint_every, job.device)
        self.guard = FiniteGuard(job.spec, job.stage, job.first_step)
        self.trained = Trained()
        self.steps_done = 0
        """Optimizer steps of the stage."""
        self._unlogged = 0

    @property
    def number(self) -> int:
        """The step that comes next, counted over the whole trial, from 0."""
        return self.job.first_step + self.steps_done

    @property
    def left(self) -> int:
        """Steps of the stage that remain."""
        return self.job.steps - self.steps_done

    def own(self, losses: Tensor) -> Tensor:
        """Its loss (), as a view of the losses of all members."""
        return losses if self.slot is None else losses[self.slot]

    def weight(self) -> int:
        """Tokens or images of its step: members share the seconds of a round in this proportion."""
        step_data = self.rows.seen(self.number if self.left else self.number - 1)
        return step_data.tokens + step_data.images

    def clear_gradients(self, *, keep: bool) -> None:
        """Free the gradients; with `keep`, zero their tensors, which further passes add to."""
        self.optimizer.zero_grad(set_to_none=not keep)

    @contextlib.contextmanager
    def with_gradients(self) -> Iterator[None]:
        """Give every parameter a gradient of zeros that a pass inside adds to; at the end, free those it left alone.

        A parameter without a gradient is not updated, so it must have none, and not one of zeros. Parameters whose
        gradient the optimizer keeps elsewhere are left out.
        """
        import torch

        zeros: list[tuple[nn.Parameter, Tensor]] = []
        for parameter in self.parameters:
            if parameter.requires_grad and parameter.grad is None and not keeps_gradient(self.optimizer, parameter):
                parameter.grad = torch.zeros_like(parameter)
                zeros.append((parameter, parameter.grad))
        yield
        for parameter, gradient in zeros:
            if parameter.grad is gradient and gradient._version == 0:  # noqa: SLF001 - torch counts changes there
                parameter.grad = None

    def end_step(self, loss: Tensor, *, keep_gradients: bool) -> tuple[Tensor, float]:
        """Clip, guard, update, and set the rate of the next step; returns the gradient's norm and this step's rate.

        Args:
            loss: (), the sum of losses since the last log.
            keep_gradients: zero the gradients' tensors, where they are used again.
        """
        import torch

        limit = self.job.stage.max_grad_norm
        clip = getattr(self.optimizer, "clip", None)  # of an optimizer that keeps the gradients itself
        if clip is not None:
            norm = clip(limit)
        else:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, math.inf if limit is None else limit)
            norm = cast(Any, norm).full_tensor() if is_spread(norm) else norm
        # A layer-wise optimizer has used and freed the gradients by now; `worst` is NaN if one of them was not finite.
        self.guard.see(self.steps_done + 1, loss, norm + getattr(self.optimizer, "worst", 0.0))
        rate = float(self.rates.get_last_lr()[0])
        self.optimizer.step()
        self.rates.step()
        self.clear_gradients(keep=keep_gradients)
        if self.average is not None:
            self.average.step(self.parameters)
        self.steps_done += 1
        self._unlogged += 1
        step_data = self.rows.seen(self.number - 1)
        self.trained.tokens += step_data.tokens
        self.trained.images += step_data.images
        self.trained.steps, self.trained.timed_steps = self.steps_done, self.trained.timed_steps + 1
        return norm, rate

    def evaluates(self) -> bool:
        """Whether it is evaluated after the step that has just ended."""
        every = self.job.spec.train.eval_every
        return every is not None and self.steps_done % every == 0 and self.left > 0

    def logs(self) -> bool:
        """Whether the step that has just ended is logged."""
        last = self.job.logs_last and self.steps_done == self.job.steps
        return self.steps_done == 1 or self.steps_done % self.job.spec.train.log_every == 0 or last

    def log(self, loss: float, norm: Tensor, rate: float) -> None:
        """Report the mean loss since the last log; `loss` is their sum."""
        mean = loss / self._unlogged
        self._unlogged = 0
        self.trained.losses.append(mean)
        self.job.costs.count(self.number, self.trained.tokens)
        metrics = {"train_loss": mean, "grad_norm": float(norm), "lr": rate, "epoch": self.rows.epoch(self.number)}
        self.job.report(metrics, self.number)

    def evaluate(self) -> None:
        """Report the held-out loss of the weights, or of their average."""
        if self.average is not None:
            self.average.store(self.parameters)
            self.average.copy_to(self.parameters)
        loss = self.job.evaluate()
        if self.average is not None:
            self.average.restore(self.parameters)
        self.trained.eval_losses.append(loss)
        self.job.report({"eval_loss": loss}, self.number)

    def check_disk(self) -> None:
        """Compare what the stage writes with the space that is free.

        Raises:
            StorageError: it does not fit.
        """
        train, state = self.job.spec.train, disk.state_bytes(self.parameters, self.optimizer)
        weights = sum(parameter.numel() for parameter in self.parameters) * disk.SAVED_BYTES[train.save_dtype]
        disk.check(self.job.folder, weights, state, steps=self.job.steps, every=train.checkpoint_every)

    def end(self) -> None:
        """Leave the trained weights, or their average, in the model, and no gradients."""
        self.clear_gradients(keep=False)
        if self.average is not None:
            self.average.copy_to(self.parameters)

    def state(self) -> dict[str, Any]:
        """All that a checkpoint needs."""
        return {
            "step": self.steps_done,
            "unlogged": self._unlogged,
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "rates": self.rates.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "eval_losses": self.trained.eval_losses,
            "cost": cost.plain(self.trained, self.job.costs),
        }

    def restore(self, state: dict[str, Any], where: Path) -> None:
        """Go on from `state`; `where` is its checkpoint."""
        checkpoint.put_back(self.parameters, state["parameters"])
        self.optimizer.load_state_dict(spread_state(state["optimizer"], self.optimizer))
        self.rates.load_state_dict(state["rates"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
            self.average.to(device=self.job.device)
        self.steps_done = int(state["step"])
        self._unlogged = int(state.get("unlogged", 0))
        cost.restore(state.get("cost"), self.trained, self.job.costs, where)
        self.trained.steps = self.steps_done
        self.trained.eval_losses = list(state["eval_losses"])
        self.trained.resumed_from_step = self.number
