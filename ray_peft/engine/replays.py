"""Work without gradients on tensors of static shape: done as it is, or recorded once for a GPU to replay."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

from ray_peft.engine.recovery import free_memory, is_out_of_memory

logger = logging.getLogger(__name__)


class Replays:
    """Work of a few static shapes; on a GPU each is recorded once as a CUDA graph, all on one memory pool.

    The first call of a shape runs as usual, in the pool; the second is recorded. What cannot be recorded runs as usual
    from then on, and `unrecorded` says why.
    """

    def __init__(self, *, records: bool) -> None:
        """`records`: the work is on a GPU, and may be recorded."""
        self.unrecorded: str | None = None if records else "it is not asked for"
        self._graphs: dict[Hashable, Callable[[], Any] | None] = {}
        if records:
            import torch

            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.MemPool()
        self._records = records

    def __call__(self, shape: Hashable, work: Callable[[], object]) -> None:
        """Do `work`, which reads and writes the same tensors at every call with this `shape`."""
        if not self._records:
            work()
            return
        first = shape not in self._graphs
        replay = self._graphs.setdefault(shape, None)
        if not first and replay is None and self.unrecorded is None:
            replay = self._graphs[shape] = self._recorded(work)
        if replay is not None:
            replay()
        else:
            self._aside(work)

    def _aside(self, work: Callable[[], object]) -> None:
        """Do it as usual, in the graphs' memory."""
        import torch

        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def _recorded(self, work: Callable[[], object]) -> Callable[[], Any] | None:
        """Replays the work; None if it cannot be recorded.

        Raises:
            torch.OutOfMemoryError: memory ran out: less work at a time may still be recorded.
        """
        import torch

        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        pool: Any = self._pool.id
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                work()
            replay: Callable[[], Any] = graph.replay
            return replay
        except RuntimeError as error:
            # The end of a recording that failed may fail as well; the first error is the context of that.
            failure = error.__context__ or error
        torch.cuda.set_stream(stream)  # torch.cuda.graph has not gone back to it where its end failed (torch 2.13)
        del graph
        free_memory("cuda")
        if is_out_of_memory(failure):
            raise torch.OutOfMemoryError(str(failure))
        self.unrecorded = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
        logger.warning("work cannot be recorded, and runs unrecorded, which is slower: %s", self.unrecorded)
        return None
