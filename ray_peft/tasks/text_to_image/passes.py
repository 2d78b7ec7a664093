"""Forward and backward passes of a UNet: in which dtype they run, and recorded once for the GPU to replay."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from ray_peft.methods.base import Stage
from ray_peft.spec import ImageTrialSpec
from ray_peft.tasks.memory import free_memory, is_out_of_memory
from ray_peft.tasks.text_to_image.noise import Batch

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


logger = logging.getLogger(__name__)


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


class Pass:
    """One micro-batch forward and backward; gradients and the loss add up until they are cleared."""

    def __init__(self, spec: ImageTrialSpec, model: nn.Module, device: str) -> None:
        import torch

        self._spec, self._model, self._device = spec, model, device
        self.loss = torch.zeros((), device=device)
        """Sum of the passes' shares of their steps' mean losses since `loss.zero_()`."""

    def __call__(self, batch: Batch) -> None:
        """Add the gradients and the loss of `batch`, a part of one optimizer step."""
        self._run(*self._moved(batch))

    def _moved(self, batch: Batch) -> list[Tensor]:
        return [value.to(self._device) for value in self._given(batch)]

    def _given(self, batch: Batch) -> list[Tensor]:
        """The batch in the UNet's dtype, on the CPU."""
        dtype = input_dtype(self._spec)
        samples, timesteps, texts, targets, weights = batch.tensors()
        return [samples.to(dtype), timesteps, texts.to(dtype), targets, weights]

    def _run(self, samples: Tensor, timesteps: Tensor, texts: Tensor, targets: Tensor, weights: Tensor) -> None:
        with computing(self._spec, self._device):
            predicted = self._model(samples, timesteps, encoder_hidden_states=texts).sample
        errors = (predicted.float() - targets).square().mean(dim=(1, 2, 3))
        loss = (errors * weights).sum() / self._spec.train.batch_size
        loss.backward()
        self.loss += loss.detach()


class _Staging:
    """Page-locked memory that a batch is sent from while the GPU works on the one before."""

    def __init__(self) -> None:
        import torch

        self._pages: list[Tensor] = []
        self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def send(self, values: Sequence[Tensor], to: Sequence[Tensor]) -> None:
        """Copy `values` to the GPU's tensors `to`, once the GPU has read what was sent from here before."""
        self._sent.synchronize()
        self._pages = self._pages or [value.pin_memory() for value in values]
        for page, value, target in zip(self._pages, values, to, strict=True):
            page.copy_(value)
            target.copy_(page, non_blocking=True)
        self._sent.record()


class RecordedPass(Pass):
    """The same on a GPU, recorded as a CUDA graph: at one image a step, the host would take most of the time.

    The first call runs as usual, the second records; all calls have batches of one shape. Both run on one stream of
    their own, as torch's documentation asks, so that there is one workspace of cuBLAS (32 MiB) and not three. Where
    memory does not suffice for a recording, which has its own beside that of other work, all calls run as usual.
    """

    def __init__(self, spec: ImageTrialSpec, model: nn.Module, device: str) -> None:
        import torch

        super().__init__(spec, model, device)
        self._inputs: list[Tensor] = []
        self._staging = [_Staging(), _Staging()]
        self._replay: Callable[[], None] | None = None
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, batch: Batch) -> None:
        """Add the gradients and the loss of `batch`."""
        if not self._inputs:
            self._inputs = self._moved(batch)
            self._aside()
            return
        self._staging.reverse()
        self._staging[0].send(self._given(batch), self._inputs)
        if self._replay is None:
            self._replay = self._recorded() or self._aside
        self._replay()

    def _aside(self) -> None:
        """Run as usual."""
        import torch

        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._run(*self._inputs)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _recorded(self) -> Callable[[], None] | None:
        """Replays what `_run` does to the inputs; null if memory ran out."""
        import torch

        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._run(*self._inputs)
            return graph.replay
        except RuntimeError as error:
            # The end of a recording that failed may fail as well; the first error is the context of that.
            if not any(is_out_of_memory(each) for each in (error, error.__context__) if each is not None):
                raise
        # torch.cuda.graph has not gone back to it where its end failed (torch 2.13).
        torch.cuda.set_stream(stream)
        del graph
        free_memory(self._device)
        logger.warning("there is no memory to record a pass; passes run unrecorded, which is slower")
        return None
