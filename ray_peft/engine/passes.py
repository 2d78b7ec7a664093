"""Forward and backward passes: run as they are, or recorded once for the GPU to replay."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic

from ray_peft.engine.contract import Computation, PartT
from ray_peft.engine.recovery import free_memory, is_out_of_memory
from ray_peft.engine.replays import end_recording, uncollected

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


class Pass(Generic[PartT]):
    """One pass forward and backward; gradients and the loss add up until they are cleared."""

    def __init__(self, computation: Computation[PartT], device: str) -> None:
        import torch

        self._computation, self._device = computation, device
        self.how = "as they are"
        """How passes run, for the trial's row."""
        self.loss = torch.zeros(() if computation.members is None else (computation.members,), device=device)
        """Sums, () or by member, of the passes' shares of their steps' mean losses since `loss.zero_()`."""

    def __call__(self, part: PartT) -> None:
        """Add the gradients and the loss of `part`, a part of one optimizer step."""
        self._run(*self._moved(part))

    def forward_alone(self, part: PartT) -> None:
        """Compute the loss and drop it."""
        self._computation.loss(*self._moved(part))

    def _moved(self, part: PartT) -> list[Tensor]:
        return [_sent(value, self._device) for value in self._computation.inputs(part)]

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


class RecordedPass(Pass[PartT]):
    """The same on a GPU, recorded as a CUDA graph: at few rows a pass, the host would take most of the time.

    The first call runs as usual, the second records; all calls have parts of one shape. Both run on one stream of
    their own, as torch's documentation asks, so that there is one workspace of cuBLAS (32 MiB) and not three. Where
    memory does not suffice for a recording, which has its own beside that of other work, all calls run as usual.
    """

    def __init__(self, computation: Computation[PartT], device: str) -> None:
        import torch

        super().__init__(computation, device)
        self._inputs: list[Tensor] = []
        self._staging = [_Staging(), _Staging()]
        self._replay: Callable[[], None] | None = None
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, part: PartT) -> None:
        """Add the gradients and the loss of `part`."""
        if not self._inputs:
            self._inputs = self._moved(part)
            self._aside()
            return
        self._staging.reverse()
        self._staging[0].send(self._computation.inputs(part), self._inputs)
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
        """Replays what `_run` does to the inputs; None if memory ran out."""
        import torch

        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with uncollected(), torch.cuda.graph(graph, stream=self._stream):
                self._run(*self._inputs)
            replay: Callable[[], Any] = graph.replay
            return replay
        except RuntimeError as error:
            # The end of a recording that failed may fail as well; the first error is the context of that.
            if not any(is_out_of_memory(failure) for failure in (error, error.__context__) if failure is not None):
                raise
        # torch.cuda.graph has not gone back to it where its end failed (torch 2.13).
        torch.cuda.set_stream(stream)
        del graph
        free_memory(self._device)
        logger.warning("there is no memory to record a pass; passes run unrecorded, which is slower")
        return None


class RecordedPasses(Pass[PartT]):
    """Passes of a few static shapes on a GPU, each recorded once as a CUDA graph, all on one memory pool.

    The first pass of a shape runs as usual, in the pool; the second is recorded. What cannot be recorded runs as usual
    from then on, and `unrecorded` says why.
    """

    def __init__(self, computation: Computation[PartT], device: str) -> None:
        import torch

        super().__init__(computation, device)
        self._shapes: dict[tuple[object, ...], _Shape] = {}
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.MemPool()
        self.unrecorded: str | None = None
        self.how = "recorded"

    def __call__(self, part: PartT) -> None:
        """Add the gradients and the loss of `part`."""
        inputs = self._computation.inputs(part)
        key = tuple((tuple(value.shape), value.dtype) for value in inputs)
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = _Shape([value.to(self._device) for value in inputs])
            self._aside(shape)
            return
        shape.staging.reverse()
        shape.staging[0].send(inputs, shape.inputs)
        if shape.replay is None and self.unrecorded is None:
            shape.replay = self._recorded(shape)
        if shape.replay is None:
            self._aside(shape)
        else:
            shape.replay()

    def _aside(self, shape: _Shape) -> None:
        """Run as usual, in the graphs' memory."""
        import torch

        self._stream.wait_stream(torch.cuda.current_stream())
        with uncollected(), torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool):
            self._run(*shape.inputs)
        torch.cuda.current_stream().wait_stream(self._stream)

    def _recorded(self, shape: _Shape) -> Callable[[], None] | None:
        """Replays what `_run` does to the inputs; None if it cannot be recorded."""
        import torch

        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        pool: Any = self._pool.id
        try:
            with uncollected(), torch.cuda.graph(graph, pool=pool, stream=self._stream):
                self._run(*shape.inputs)
            replay: Callable[[], Any] = graph.replay
            return replay
        except RuntimeError as error:
            # The end of a recording that failed may fail as well; the first error is the context of that.
            first = error.__context__ or error
            self.unrecorded = f"{type(first).__name__}: {str(first).splitlines()[0]}"
            self.how = f"as they are, since they cannot be recorded ({self.unrecorded})"
            del first  # whose traceback holds this frame, and with it the pool
        del graph
        end_recording(pool, stream)
        logger.warning("a pass cannot be recorded, so passes run unrecorded, which is slower: %s", self.unrecorded)
        return None


class _Shape:
    """A static shape: the tensors that its passes read, and its recording."""

    def __init__(self, inputs: list[Tensor]) -> None:
        self.inputs = inputs
        self.staging = [_Staging(), _Staging()]
        self.replay: Callable[[], None] | None = None
