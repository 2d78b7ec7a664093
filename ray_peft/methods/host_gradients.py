"""GaLore with gradients in the host's memory: the GPU holds the gradient of one layer at a time.

As soon as a backward pass has computed a gradient, it is added to the host's copy and freed. So gradients accumulate
over passes, the norm is that of the whole step, and new subspaces are computed from the whole gradient, as in plain
GaLore. For the update, each gradient is copied back and projected. The host never waits for the GPU, and a recorded
pass contains these copies.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ray_peft.methods.galore_adamw import GaLoreAdamW
from ray_peft.methods.vocabulary import is_added_in_place

SMALL = 2**16
"""Gradients with fewer numbers stay on the GPU: the copy would cost more than the memory is worth."""
BYTES_IN_FLIGHT = 2**26
"""Bytes of gradients that are being copied at a time."""


class HostGaLoreAdamW(GaLoreAdamW):
    """GaLore's AdamW with gradients on the host; those of small weights and of a vocabulary stay on the GPU."""

    at_a_time, grams_at_a_time = GaLoreAdamW.at_a_time // 4, GaLoreAdamW.grams_at_a_time // 4

    overlaps = False
    """Copy while the backward pass runs, on two more streams. Off: no GPU has run tests/gpu/test_gpu_galore.py yet."""

    def __init__(self, groups: Iterable[dict[str, object]], **settings: Any) -> None:
        """As `GaLoreAdamW`."""
        super().__init__(groups, **settings)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        away = [p for p in parameters if p.numel() >= SMALL and not is_added_in_place(p)]
        self._places = {id(parameter): place for place, parameter in enumerate(away)}
        self._here = [parameter for parameter in parameters if id(parameter) not in self._places]
        self._host_gradients = [_on_host(parameter) for parameter in away]
        self._offloaded = [False] * len(away)
        device = parameters[0].device
        self._filled = torch.zeros(len(away), dtype=torch.bool, device=device)
        """Whether a pass of this step has written a gradient; on the GPU, so that recorded passes can set it."""
        self._norms = torch.zeros(len(away), dtype=torch.float32, device=device)
        self._copies = _CopyStreams() if device.type == "cuda" and self.overlaps else None
        self._factor: Tensor | None = None
        """The factor of clipping on the gradients."""
        for place, parameter in enumerate(away):
            parameter.register_post_accumulate_grad_hook(_offload_hook(weakref.ref(self), place))

    def holds_gradient(self, parameter: Tensor) -> bool:
        """Whether a weight's gradient is on the host."""
        return id(parameter) in self._places

    def clip(self, limit: float | None) -> Tensor:
        """Scale the step's gradients to a norm of at most `limit`; returns their norm (), over all passes."""
        here = [parameter.grad for parameter in self._here if parameter.grad is not None]
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32)[None] for grad in here]
        norm: Tensor = torch.linalg.vector_norm(torch.cat([self._norms, *norms]))
        self._factor = torch.clamp((math.inf if limit is None else limit) / (norm + 1e-6), max=1.0)
        for grad in here:
            grad.mul_(self._factor)
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard the step's gradients."""
        super().zero_grad(set_to_none)
        self._filled.zero_()
        self._norms.zero_()
        self._factor = None

    def _has_gradient(self, parameter: Tensor) -> bool:
        place = self._places.get(id(parameter))
        return super()._has_gradient(parameter) if place is None else self._offloaded[place]

    def _gradient(self, parameter: Tensor) -> Tensor:
        place = self._places.get(id(parameter))
        if place is None:
            return super()._gradient(parameter)
        grad = self._fetched(parameter, place)
        return grad if self._factor is None else grad.mul_(self._factor)

    def _fetched(self, parameter: Tensor, place: int) -> Tensor:
        """A copy on the GPU of the gradient that the host has for this step; zeros before the first pass."""
        grad = torch.empty_like(parameter, memory_format=torch.contiguous_format)
        grad.copy_(self._host_gradients[place], non_blocking=True)
        return torch.where(self._filled[place], grad, 0.0)

    def _offload(self, parameter: Tensor, place: int) -> None:
        assert parameter.grad is not None
        grad, parameter.grad = parameter.grad, None
        self._offloaded[place] = True
        if self._copies is None:
            self._add(self._fetched(parameter, place), grad, place)
            return
        on_host = self._copies.fetch(lambda: self._fetched(parameter, place))
        self._copies.send_back(on_host, grad, lambda: self._add(on_host, grad, place))

    def _add(self, on_host: Tensor, grad: Tensor, place: int) -> None:
        on_host.add_(grad)
        self._host_gradients[place].copy_(on_host, non_blocking=True)
        self._norms[place].copy_(torch.linalg.vector_norm(on_host, dtype=torch.float32))
        self._filled[place].fill_(True)


class _CopyStreams:
    """Two CUDA streams that copy from the host and to it while a backward pass runs.

    The tensors of a copy stay alive until the copy has ended; if they exceed `BYTES_IN_FLIGHT`, the pass waits for the
    oldest copy. At its end the pass waits for both streams, so that a recorded pass contains all copies.
    """

    def __init__(self) -> None:
        self._from_host, self._to_host = (torch.cuda.Stream() for _ in range(2))  # type: ignore[no-untyped-call]
        self._in_flight: list[tuple[torch.cuda.Event, Tensor, Tensor]] = []
        self._bytes = 0
        self._in_pass = False

    def fetch(self, work: Callable[[], Tensor]) -> Tensor:
        """The tensor that `work` copies from the host; pass it to `send_back`."""
        if not self._in_pass:
            self._in_pass = True
            self._from_host.wait_stream(torch.cuda.current_stream())
            self._to_host.wait_stream(torch.cuda.current_stream())
            torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)  # noqa: SLF001 - as torch's own FSDP
        with torch.cuda.stream(self._from_host):
            return work()

    def send_back(self, on_host: Tensor, grad: Tensor, work: Callable[[], None]) -> None:
        """Let `work` add `grad` to `on_host` and copy the sum to the host."""
        self._to_host.wait_stream(self._from_host)
        self._to_host.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._to_host):
            work()
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(self._to_host)
        self._in_flight.append((copied, on_host, grad))
        self._bytes += 2 * grad.nbytes
        while self._bytes > BYTES_IN_FLIGHT and len(self._in_flight) > 1:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        copied, _, grad = self._in_flight.pop(0)
        torch.cuda.current_stream().wait_event(copied)
        self._from_host.wait_event(copied)
        self._bytes -= 2 * grad.nbytes

    def _end_pass(self) -> None:
        """The end of a backward pass."""
        torch.cuda.current_stream().wait_stream(self._from_host)
        torch.cuda.current_stream().wait_stream(self._to_host)
        self._in_flight.clear()
        self._bytes, self._in_pass = 0, False


def _on_host(parameter: Tensor) -> Tensor:
    if parameter.device.type == "meta":  # of no size: predictions count the GPU's bytes
        return torch.empty(1, dtype=parameter.dtype, device="meta").expand(parameter.shape)
    if parameter.device.type != "cuda":
        return torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    return torch.zeros(parameter.shape, dtype=parameter.dtype, pin_memory=True)


def _offload_hook(optimizer: weakref.ref[HostGaLoreAdamW], place: int) -> Any:
    # Python's garbage collector does not follow the hooks of a tensor: a reference to the optimizer would keep all
    # weights alive.
    def offload(parameter: Tensor) -> None:
        self = optimizer()
        if self is not None:  # a later stage trains with another optimizer
            with torch.no_grad():
                self._offload(parameter, place)

    return offload
