"""Forward and backward passes: run as they are, or recorded once for the GPU to replay."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Generic

from ray_peft.engine.contract import Computation, PartT
from ray_peft.engine.replays import Replays

if TYPE_CHECKING:
    from torch import Tensor


class Pass(Generic[PartT]):
    """One pass forward and backward; gradients and the loss add up until they are cleared."""

    def __init__(self, computation: Computation[PartT], device: str) -> None:
        import torch

        self._computation, self._device = computation, device
        self.how = "as they are"
        """How passes run, for the trial's row."""
        self.loss = torch.zeros(() if computation.members is None else (computation.members,), device=device)
        """Sums, () or by member, of the passes' shares of their steps' mean losses since `loss.zero_()`."""

    def __call__(self, inputs: Sequence[Tensor]) -> None:
        """Add the gradients and the loss of a part of one optimizer step, from what `Computation.inputs` returned."""
        self._run(*self._moved(inputs))

    def forward_alone(self, inputs: Sequence[Tensor]) -> None:
        """Compute the loss and drop it."""
        self._computation.loss(*self._moved(inputs))

    def idle(self, inputs: Sequence[Tensor]) -> None:
        """Compute and drop the loss and its gradients, which become zeros, so that other workers can go on."""
        (self._computation.loss(*self._moved(inputs)).sum() * 0).backward()  # type: ignore[no-untyped-call]

    def _moved(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [_sent(value, self._device) for value in inputs]

    def _run(self, *inputs: Tensor) -> None:
        loss = self._computation.loss(*inputs)
        (loss if loss.ndim == 0 else loss.sum()).backward()  # type: ignore[no-untyped-call]
        self.loss += loss.detach()


def _sent(value: Tensor, device: str) -> Tensor:
    """On the device; nothing waits for the copy."""
    return value if device == "cpu" else value.pin_memory().to(device, non_blocking=True)


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


class RecordedPasses(Pass[PartT]):
    """Passes of a few static shapes on a GPU, each recorded once as a CUDA graph.

    At few rows a pass, the host would take most of the time. The first pass of a shape runs as usual, the second is
    recorded. What cannot be recorded runs as usual from then on, for want of memory, too; `how` says why.
    """

    def __init__(self, computation: Computation[PartT], device: str) -> None:
        super().__init__(computation, device)
        self._shapes: dict[tuple[object, ...], _Shape] = {}
        self._replays = Replays(records=True, divisible=False)
        self.how = "recorded"

    def __call__(self, inputs: Sequence[Tensor]) -> None:
        """As `Pass`."""
        key = tuple((tuple(value.shape), value.dtype) for value in inputs)
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = _Shape([value.to(self._device) for value in inputs])
        else:
            shape.staging.reverse()
            shape.staging[0].send(inputs, shape.inputs)
        self._replays(key, partial(self._run, *shape.inputs))
        if self._replays.unrecorded is not None:
            self.how = f"as they are, since they cannot be recorded ({self._replays.unrecorded})"


class _Shape:
    """A static shape: the tensors that its passes read, and what they are sent from."""

    def __init__(self, inputs: list[Tensor]) -> None:
        self.inputs = inputs
        self.staging = [_Staging(), _Staging()]
