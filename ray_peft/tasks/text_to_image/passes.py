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

    from ray_peft.engine.row_dropout import RowDropout


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


def running_again(dropout: RowDropout | None, *, random: bool = False) -> Callable[..., Any]:
    """Torch's checkpoint function, which computes again in the backward pass.

    Args:
        dropout: what rows drop, then as before.
        random: keep the random state for it, which draws by the pass need; a recorded pass cannot do that.
    """
    from torch.utils.checkpoint import checkpoint

    contexts: dict[str, Any] = {} if dropout is None else {"context_fn": dropout.contexts}
    return partial(checkpoint, use_reentrant=False, preserve_rng_state=random, **contexts)


def spare_activations(spec: ImageTrialSpec, unet: Any, run_again: Callable[..., Any], *, random: bool = False) -> None:
    """Keep fewer activations for the backward pass: those of block borders alone, or all but the feed-forward layers'.

    Args:
        spec: says whether gradients are checkpointed.
        unet: a UNet2DConditionModel, without PEFT's wrapper.
        run_again: torch's checkpoint function.
        random: a pass draws random numbers; then the feed-forward layers keep their activations.
    """
    if spec.train.gradient_checkpointing:
        unet.enable_gradient_checkpointing(run_again)
    elif not random:
        recompute_feed_forward(unet, run_again)


def recompute_feed_forward(unet: Any, run_again: Callable[..., Any]) -> None:
    """Recompute what is inside the feed-forward layers in the backward pass: a third of all activations.

    Their gates are four times as wide as the rest and cheap to make again, unlike attention and convolutions.
    `run_again` is torch's checkpoint function.
    """
    from diffusers.models.attention import FeedForward

    for layer in unet.modules():
        if isinstance(layer, FeedForward):
            cast(Any, layer).forward = partial(run_again, type(layer).forward, layer)


class UNetLoss(Computation[Batch]):
    """A pass's share of the mean squared error of what the UNet predicts of a step's images."""

    keeps_gradients = True

    def __init__(self, spec: ImageTrialSpec, model: nn.Module, device: str, dropout: RowDropout | None = None) -> None:
        """Remember the UNet, with the stage attached, and what rows drop, if anything."""
        self._spec, self._model, self._device, self._dropout = spec, model, device, dropout

    def inputs(self, part: Batch) -> list[Tensor]:
        """The batch in the UNet's dtype."""
        dtype = input_dtype(self._spec)
        samples, timesteps, texts, targets, weights, keys = part.tensors()
        return [samples.to(dtype), timesteps, texts.to(dtype), targets, weights, keys]

    def loss(self, *inputs: Tensor) -> Tensor:
        """Given what `inputs` made, on the device."""
        samples, timesteps, texts, targets, weights, keys = inputs
        if self._dropout is not None:
            self._dropout.begin(keys)
        with computing(self._spec, self._device):
            predicted = self._model(samples, timesteps, encoder_hidden_states=texts).sample
        errors = (predicted.float() - targets).square().mean(dim=(1, 2, 3))
        share: Tensor = (errors * weights).sum() / self._spec.train.batch_size
        return share
