"""One stage of training a UNet on cached latents."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from ray_peft.engine.loop import Engine
from ray_peft.engine.member import Job, Member
from ray_peft.engine.passes import Pass, RecordedPasses
from ray_peft.engine.row_dropout import RowDropout, row_dropout
from ray_peft.engine.trained import Trained
from ray_peft.methods.optimizers import trainable
from ray_peft.spec import ImageTrialSpec
from ray_peft.tasks.text_to_image.noise import Batch, Draws
from ray_peft.tasks.text_to_image.passes import UNetLoss, running_again, spare_activations, unwrapped

if TYPE_CHECKING:
    from torch import Tensor, nn


def train_stage(spec: ImageTrialSpec, job: Job, draws: Draws, model: nn.Module) -> Trained:
    """Train `model` in place for the stage's steps; goes on from the last checkpoint where there is one.

    Args:
        spec: the trial.
        job: its stage.
        draws: the images and noise of each step.
        model: the UNet, with the stage attached.
    """
    import torch

    if job.device != "cpu":
        torch._C._cuda_clearCublasWorkspaces()  # those of earlier evaluations, on another stream
    dropout, unkeyed = _dropout(spec, job, draws, model)
    random = unkeyed is not None
    spare_activations(spec, unwrapped(model), running_again(dropout, random=random), random=random)
    member = Member(job, model, draws, _average(spec, model))
    computation = UNetLoss(spec, model, job.device, dropout)
    with contextlib.nullcontext() if dropout is None else dropout.installed():
        Engine([member], model, draws, computation, _kind_of_pass(spec, job, random=random)).run()
    if unkeyed is not None:
        member.trained.passes += f"; dropout is drawn by the pass: {unkeyed}"
    if job.device != "cpu":
        torch._C._cuda_clearCublasWorkspaces()  # each stream has one, which would stay until the process ends
    return member.trained


def _dropout(spec: ImageTrialSpec, job: Job, draws: Draws, model: nn.Module) -> tuple[RowDropout | None, str | None]:
    """The dropout that is drawn by the row, tried on the stage's first image; or the reason why it is not."""

    def loss(dropout: RowDropout) -> Tensor:
        computation = UNetLoss(spec, model, job.device, dropout)
        part = draws.batch(job.first_step).part(0, 1)
        return computation.loss(*(value.to(job.device) for value in computation.inputs(part)))

    return row_dropout(model, job.device, loss)


def _kind_of_pass(spec: ImageTrialSpec, job: Job, *, random: bool) -> type[Pass[Batch]]:
    train = spec.train
    restores_draws = train.gradient_checkpointing and random
    return RecordedPasses if job.device != "cpu" and train.cuda_graphs and not restores_draws else Pass


def _average(spec: ImageTrialSpec, model: nn.Module) -> Any:
    """Diffusers' exponential moving average of the trained parameters, in float32; None without `ema_decay`."""
    if spec.train.ema_decay is None:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(trainable(model), decay=spec.train.ema_decay, foreach=True)
