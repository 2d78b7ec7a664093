"""One stage of training a UNet on cached latents."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.methods.base import Stage
from ray_peft.methods.optimizers import trainable
from ray_peft.spec import ImageTrialSpec
from ray_peft.tasks import cost
from ray_peft.tasks.base import Costs, Report, Trained
from ray_peft.tasks.finite import FiniteGuard
from ray_peft.tasks.memory import MICRO_BATCH, divisor, free_memory, is_out_of_memory
from ray_peft.tasks.text_to_image.noise import Batch, Draws
from ray_peft.tasks.text_to_image.passes import Pass, RecordedPass, draws_in_passes, spare_activations, unwrapped

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"


@dataclass(frozen=True)
class StageJob:
    """What one stage trains on, and where it keeps checkpoints."""

    stage: Stage
    steps: int
    first_step: int
    """Optimizer steps that earlier stages of the trial have done."""
    draws: Draws
    folder: Path
    device: str
    report: Report
    evaluate: Callable[[], float]
    """The loss on the held-out images, of the model as it is."""
    lowered: dict[str, int] = field(default_factory=dict)
    """What memory forced down in earlier stages; this stage starts with it, and adds to it (`Bench.lowered`)."""
    costs: Costs = field(default_factory=Costs)
    """Of the trial; checkpoints carry them."""


def train_stage(spec: ImageTrialSpec, job: StageJob, model: nn.Module) -> Trained:
    """Train `model` in place for the stage's steps; goes on from the last checkpoint where there is one."""
    import torch

    if job.device != "cpu":
        torch._C._cuda_clearCublasWorkspaces()  # of evaluations before, on another stream
    loop = _Loop(spec, job, model)
    loop.resume()
    if job.device != "cpu":
        torch.cuda.synchronize()
    model.train()
    loop.begin = time.perf_counter()
    for step in range(loop.done, job.steps):
        loop.step(step)
    loop.guard.check()  # waits for the last step
    loop.trained.seconds = loop.seconds()
    model.eval()
    loop.end()
    if job.device != "cpu":
        torch._C._cuda_clearCublasWorkspaces()  # one a stream, which would stay for ever
    return loop.trained


class _Loop:
    """The state of a stage's training."""

    def __init__(self, spec: ImageTrialSpec, job: StageJob, model: nn.Module) -> None:
        from transformers import get_scheduler

        self._spec, self._job, self._model = spec, job, model
        self._rank, self._workers = _place()
        self._parameters = trainable(model)
        self._optimizer: Optimizer = job.stage.optimizer(model)
        train = spec.train
        self._rates = get_scheduler(
            train.schedule if train.schedule != "constant" else "constant_with_warmup",
            self._optimizer,
            num_warmup_steps=train.warmup_steps or math.ceil(train.warmup_ratio * job.steps),
            num_training_steps=job.steps,
        )
        self._share = train.batch_size // self._workers
        self._rows = train.micro_batch_size
        if self._workers == 1:
            self._rows = divisor(self._share, min(self._rows, job.lowered.get(MICRO_BATCH, self._rows)))
        spare_activations(spec, job.stage, unwrapped(model))
        self._pass = _pass(spec, job, model)
        self._average = _average(spec, self._parameters)
        self.guard = FiniteGuard(spec, job.stage, job.first_step)
        self.trained = Trained()
        self.done = 0
        self.begin = 0.0
        """When this attempt's steps began, on the performance counter."""
        self._unlogged = 0

    def seconds(self) -> float:
        """Of the stage's training up to now, over all attempts."""
        return self.trained.seconds + time.perf_counter() - self.begin

    def step(self, step: int) -> None:
        """One optimizer step, from 0."""
        import torch

        train, job = self._spec.train, self._job
        self._pass_all(job.draws.batch(job.first_step + step), step)
        if self._workers > 1:
            self._add_up()
        limit = job.stage.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, math.inf if limit is None else limit)
        self.guard.see(step + 1, self._pass.loss, norm)
        rate = float(self._rates.get_last_lr()[0])
        self._optimizer.step()
        self._rates.step()
        # Not to None: a recorded pass adds to the same tensors.
        self._optimizer.zero_grad(set_to_none=False)
        if self._average is not None:
            self._average.step(self._parameters)
        self.done = step + 1
        self._unlogged += 1
        self.trained.steps, self.trained.timed_steps = self.done, self.trained.timed_steps + 1
        self.trained.images += train.batch_size
        if step == 0 or self.done % train.log_every == 0 or self.done == job.steps:
            self._log(norm, rate)
        if train.eval_every and self.done % train.eval_every == 0 and self.done < job.steps:
            self._evaluate()
        if train.checkpoint_every and self.done % train.checkpoint_every == 0 and self.done < job.steps:
            self._save()

    def resume(self) -> None:
        """Go on from the last checkpoint, if there is one."""
        import torch

        found = sorted(self._job.folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        if not found:
            return
        state: dict[str, Any] = torch.load(found[-1] / STATE_FILE, map_location=self._job.device, weights_only=True)
        with torch.no_grad():
            for parameter, kept in zip(self._parameters, state["parameters"], strict=True):
                parameter.copy_(kept)
        self._optimizer.load_state_dict(state["optimizer"])
        self._rates.load_state_dict(state["rates"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self.done = int(state["step"])
        cost.take_up(state.get("cost"), self.trained, self._job.costs, found[-1])
        self.trained.steps = self.done
        self.trained.eval_losses = list(state["eval_losses"])
        self.trained.images = self.done * self._spec.train.batch_size
        self.trained.resumed_from_step = self._job.first_step + self.done
        if "random" in state:  # not in version 0.1.0
            _draw_from(state["random"], self._job.device)

    def end(self) -> None:
        """Leave the trained weights, or their average, in the model, and no gradients."""
        self._optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.copy_to(self._parameters)

    def _pass_all(self, batch: Batch, step: int) -> None:
        """Add the gradients and the loss of this worker's rows of a step, with fewer a pass where memory runs out.

        With dropout, the draws from there on are others.
        """
        before, start = self._pass.loss.clone(), self._rank * self._share
        while True:
            try:
                for first in range(start, start + self._share, self._rows):
                    self._pass(batch.part(first, self._rows))
                return
            except RuntimeError as error:
                # A worker that repeated a pass alone would keep the others waiting.
                if self._workers > 1 or self._rows == 1 or not is_out_of_memory(error):
                    raise
            self._lower(before, step)

    def _lower(self, loss: torch.Tensor, step: int) -> None:
        """Make the step start anew from `loss`, with at most half as many rows a pass, and as many in each."""
        import torch

        device, rows = self._job.device, self._rows
        if device != "cpu":
            torch.cuda.synchronize()  # what is replayed belongs to a recorded pass
        self._optimizer.zero_grad(set_to_none=True)
        del self._pass
        free_memory(device)
        self._rows = self._job.lowered[MICRO_BATCH] = divisor(self._share, rows // 2)
        self._pass = _pass(self._spec, self._job, self._model)
        self._pass.loss.copy_(loss)
        logger.warning(
            "a pass of %d rows ran out of memory at step %d; going on with %d rows a pass",
            rows, self._job.first_step + step + 1, self._rows,
        )  # fmt: skip

    def _add_up(self) -> None:
        """Sum the gradients over the workers, each of which divided by the whole batch."""
        import torch
        from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        flat = _flatten_dense_tensors(grads)  # type: ignore[no-untyped-call]
        torch.distributed.all_reduce(flat)
        summed = _unflatten_dense_tensors(flat, grads)  # type: ignore[no-untyped-call]
        for grad, total in zip(grads, summed, strict=True):
            grad.copy_(total)

    def _log(self, norm: torch.Tensor, rate: float) -> None:
        import torch

        self.guard.check()
        if self._workers > 1:
            torch.distributed.all_reduce(self._pass.loss)
        loss = float(self._pass.loss) / self._unlogged
        self._pass.loss.zero_()
        self._unlogged = 0
        self.trained.losses.append(loss)
        epoch = self.trained.images / self._job.draws.count
        metrics = {"train_loss": loss, "grad_norm": float(norm), "lr": rate, "epoch": epoch}
        self._job.report(metrics, self._job.first_step + self.done)

    def _evaluate(self) -> None:
        begin = time.perf_counter()
        if self._average is not None:
            self._average.store(self._parameters)
            self._average.copy_to(self._parameters)
        loss = self._job.evaluate()
        if self._average is not None:
            self._average.restore(self._parameters)
        self.trained.eval_losses.append(loss)
        self._job.report({"eval_loss": loss}, self._job.first_step + self.done)
        self.trained.seconds -= time.perf_counter() - begin

    def _save(self) -> None:
        """Write a checkpoint beside its final name, then move it there; older ones go after that."""
        import torch

        self.guard.check()
        if self._rank > 0:
            return
        folder = self._job.folder / f"checkpoint-{self.done}"
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        state = {
            "step": self.done,
            "eval_losses": self.trained.eval_losses,
            "parameters": [parameter.detach() for parameter in self._parameters],
            "optimizer": self._optimizer.state_dict(),
            "rates": self._rates.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "random": _random_state(self._job.device),
            "cost": cost.plain(replace(self.trained, seconds=self.seconds()), self._job.costs),
        }
        torch.save(state, partial / STATE_FILE)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        for old in self._job.folder.glob("checkpoint-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)


def _pass(spec: ImageTrialSpec, job: StageJob, model: nn.Module) -> Pass:
    train = spec.train
    restores_draws = train.gradient_checkpointing and draws_in_passes(job.stage)
    recorded = job.device != "cpu" and train.cuda_graphs and not restores_draws
    return (RecordedPass if recorded else Pass)(spec, model, job.device)


def _random_state(device: str) -> dict[str, torch.Tensor]:
    """What dropout draws from, on the CPU and on the GPU; the same on every worker, since all start from one seed."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    return state if device == "cpu" else state | {"cuda": torch.cuda.get_rng_state(device)}


def _draw_from(state: dict[str, torch.Tensor], device: str) -> None:
    """Go on drawing where `_random_state` was taken. A pass that is recorded afterwards draws from there on, too."""
    import torch

    torch.set_rng_state(state["cpu"].cpu())  # loaded onto the device, as all of a checkpoint
    if device != "cpu" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def _average(spec: ImageTrialSpec, parameters: list[Any]) -> Any:
    """Diffusers' exponential moving average of what is trained, in float32; null where none is asked for."""
    if spec.train.ema_decay is None:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay=spec.train.ema_decay, foreach=True)


def _place() -> tuple[int, int]:
    """This worker's rank, and how many there are."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
