"""Forward and backward passes of a UNet: in which dtype they run, what they compute, what they recompute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ray_peft.engine.contract import Computation
from ray_peft.methods.base import Stage
from ray_peft.spec import ImageTrialSpec
from ray_peft.tasks.text_to_image.noise import Batch

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def autocasts(spec: ImageTrialSpec) -> bool:
    """Whether matrix products run in another dtype than the weights: float32 weights, bf16 products."""
    return spec.train.precision == "bf16" and spec.method.weights_dtype(spec.model.dtype) == "float32"


def input_dtype(spec: ImageTrialSpec) -> torch.dtype:
    """The dtype of what the UNet is given: that of its weights."""
    import torch

    return getattr(torch, spec.method.weights_dtype(spec.model.dtype))  # type: ignore[no-any-return]


@contextlib.contextmanager
def computing(spec: ImageTrialSpec, device: str) -> Iterator[None]:
    """The dtype of matrix products inside."""
    import torch

    kind = torch.device(device).type
    with torch.autocast(kind, dtype=torch.bfloat16) if autocasts(spec) else contextlib.nullcontext():
        yield


def light_adapters(model: nn.Module) -> nn.Module:
    """Let adapters take their input as it comes, and use their weights in its dtype.

    PEFT would copy every input into the adapter's float32 for the backward pass, and multiply there. Here the float32
    adapter is what the optimizer updates, and its bf16 copy is what is multiplied, as under autocast.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    class LightLinear(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
            return torch.nn.functional.linear(input, self.weight.to(input.dtype))

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for thin in (*layer.lora_A.values(), *layer.lora_B.values()):
                thin.__class__ = LightLinear
    return model


def attached(spec: ImageTrialSpec, stage: Stage, model: nn.Module) -> nn.Module:
    """The UNet prepared for a stage, with adapters that multiply in the dtype of their input."""
    model = stage.attach(model)
    return model if autocasts(spec) else light_adapters(model)


def unwrapped(model: Any) -> Any:
    """The UNet with its adapter layers in place, but without PEFT's wrapper, which a pipeline does not take."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def draws_in_passes(stage: Stage) -> bool:
    """Whether a pass draws random numbers: dropout."""
    return bool(getattr(stage, "dropout", 0.0) > 0)


def spare_activations(
    spec: ImageTrialSpec, stage: Stage, unet: Any, run_again: Callable[..., Any] | None = None
) -> None:
    """Keep fewer activations for the backward pass: those of block borders alone, or all but the feed-forward layers'.

    Args:
        spec: says whether gradients are checkpointed.
        stage: with dropout, the feed-forward layers keep their activations.
        unet: a UNet2DConditionModel, without PEFT's wrapper.
        run_again: replaces torch's checkpoint function.
    """
    random = draws_in_passes(stage)
    if spec.train.gradient_checkpointing:
        checkpoint_activations(unet, random=random, run_again=run_again)
    elif not random:
        recompute_feed_forward(unet, run_again)


def checkpoint_activations(unet: Any, *, random: bool, run_again: Callable[..., Any] | None = None) -> None:
    """Recompute activations in the backward pass.

    Args:
        unet: a UNet2DConditionModel.
        random: keep the random state for it, which dropout needs; a recorded pass cannot do that.
        run_again: replaces torch's checkpoint function.
    """
    from torch.utils.checkpoint import checkpoint

    again = run_again or partial(checkpoint, use_reentrant=False, preserve_rng_state=random)
    unet.enable_gradient_checkpointing(again)


def recompute_feed_forward(unet: Any, run_again: Callable[..., Any] | None = None) -> None:
    """Recompute what is inside the feed-forward layers in the backward pass: a third of all activations.

    Their gates are four times as wide as the rest and cheap to make again, unlike attention and convolutions.
    `run_again` replaces torch's checkpoint function.
    """
    from diffusers.models.attention import FeedForward
    from torch.utils.checkpoint import checkpoint

    again = run_again or partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for layer in unet.modules():
        if isinstance(layer, FeedForward) and "forward" not in vars(layer):  # else it does so already
            cast(Any, layer).forward = partial(again, layer.forward)


class UNetLoss(Computation[Batch]):
    """A pass's share of the mean squared error of what the UNet predicts of a step's images."""

    keeps_gradients = True

    def __init__(self, spec: ImageTrialSpec, model: nn.Module, device: str) -> None:
        """Remember the UNet, with the stage attached."""
        self._spec, self._model, self._device = spec, model, device

    def inputs(self, part: Batch) -> list[Tensor]:
        """The batch in the UNet's dtype."""
        dtype = input_dtype(self._spec)
        samples, timesteps, texts, targets, weights = part.tensors()
        return [samples.to(dtype), timesteps, texts.to(dtype), targets, weights]

    def loss(self, *inputs: Tensor) -> Tensor:
        """Given what `inputs` made, on the device."""
        samples, timesteps, texts, targets, weights = inputs
        with computing(self._spec, self._device):
            predicted = self._model(samples, timesteps, encoder_hidden_states=texts).sample
        errors = (predicted.float() - targets).square().mean(dim=(1, 2, 3))
        share: Tensor = (errors * weights).sum() / self._spec.train.batch_size
        return share
