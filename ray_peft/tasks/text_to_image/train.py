"""One stage of training a UNet on cached latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray_peft.engine.loop import Engine
from ray_peft.engine.member import Job, Member
from ray_peft.engine.passes import Pass, RecordedPass
from ray_peft.engine.trained import Trained
from ray_peft.methods.optimizers import trainable
from ray_peft.spec import ImageTrialSpec
from ray_peft.tasks.text_to_image.noise import Batch, Draws
from ray_peft.tasks.text_to_image.passes import UNetLoss, draws_in_passes, spare_activations, unwrapped

if TYPE_CHECKING:
    from torch import nn


def train_stage(spec: ImageTrialSpec, job: Job, draws: Draws, model: nn.Module) -> Trained:
    """Train `model` in place for the stage's steps; goes on from the last checkpoint where there is one.

    Args:
        spec: the trial.
        job: its stage.
        draws: what each step sees.
        model: the UNet, with the stage attached.
    """
    import torch

    if job.device != "cpu":
        torch._C._cuda_clearCublasWorkspaces()  # of evaluations before, on another stream
    spare_activations(spec, job.stage, unwrapped(model))
    member = Member(job, model, draws, _average(spec, model))
    Engine([member], model, draws, UNetLoss(spec, model, job.device), _kind_of_pass(spec, job)).run()
    if job.device != "cpu":
        torch._C._cuda_clearCublasWorkspaces()  # one a stream, which would stay for ever
    return member.trained


def _kind_of_pass(spec: ImageTrialSpec, job: Job) -> type[Pass[Batch]]:
    train = spec.train
    restores_draws = train.gradient_checkpointing and draws_in_passes(job.stage)
    return RecordedPass if job.device != "cpu" and train.cuda_graphs and not restores_draws else Pass


def _average(spec: ImageTrialSpec, model: nn.Module) -> Any:
    """Diffusers' exponential moving average of what is trained, in float32; None where none is asked for."""
    if spec.train.ema_decay is None:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(trainable(model), decay=spec.train.ema_decay, foreach=True)
