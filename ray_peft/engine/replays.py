"""Work on tensors of static shape: done as it is, or recorded once as a CUDA graph for a GPU to replay."""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from collections.abc import Callable, Hashable, Iterator
from functools import cache, partial
from typing import Any

from ray_peft.engine import gpu_peaks
from ray_peft.engine.recovery import free_memory, is_out_of_memory

logger = logging.getLogger(__name__)


class Replays:
    """Work of a few static shapes; on a GPU each is recorded once as a CUDA graph, all on one memory pool.

    The first call of a shape runs as usual, in the pool; the second is recorded. What cannot be recorded runs as usual
    from then on, and `unrecorded` says why. Whatever is recorded at a time shares the pool: an evaluation between two
    steps takes the memory of the training's passes. So work keeps nothing in the pool: its results are written to
    tensors that were there before.
    """

    def __init__(self, *, records: bool, divisible: bool = True) -> None:
        """Prepare to record.

        Args:
            records: the work is on a GPU, and may be recorded.
            divisible: where memory runs out in a recording, the caller does less work at a time, which may still be
                recorded; else work runs unrecorded from then on.
        """
        self._divisible = divisible
        self.unrecorded: str | None = None if records else "it is not asked for"
        self._graphs: dict[Hashable, Callable[[], Any] | None] = {}
        if records:
            import torch

            torch.cuda.empty_cache()  # what is cached outside of the pool is lost to it
            index = torch.cuda.current_device()
            self._stream = _side_stream(index)
            self._pool = _shared_pool(index)
            with torch.cuda.stream(self._stream):
                ones = torch.ones(8, 8, device=self._stream.device)
                torch.mm(ones, ones)  # so that cuBLAS gets its workspace, which stays, outside of the pool
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
        """Do the work as usual, in the graphs' memory."""
        import torch

        self._stream.wait_stream(torch.cuda.current_stream())
        with uncollected(), _in_this_thread(), torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def _recorded(self, work: Callable[[], object]) -> Callable[[], Any] | None:
        """Replays the work; None if it cannot be recorded.

        Raises:
            torch.OutOfMemoryError: memory ran out, and the work is divisible.
        """
        import torch

        if not hasattr(self._pool, _IN_USE):  # what the call before has cut up is given back
            self._pool = _pools[self._stream.device_index] = torch.cuda.MemPool()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        pool: Any = self._pool.id
        recorder = torch.cuda.graph(graph, pool=pool, stream=self._stream)
        try:
            with gpu_peaks.recording() as recording, uncollected(), _in_this_thread(), recorder:
                work()
            setattr(self._pool, _IN_USE, True)
            return partial(_replay, graph, recording)
        except RuntimeError as error:
            # The end of a recording that failed may fail as well; the first error is the context of that.
            failure = error.__context__ or error
        del graph, recorder
        end_recording(pool, stream)
        if self._divisible and is_out_of_memory(failure):
            raise torch.OutOfMemoryError(str(failure))
        self.unrecorded = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
        logger.debug("where it failed", exc_info=failure)
        logger.warning("work cannot be recorded, and runs unrecorded, which is slower: %s", self.unrecorded)
        del failure  # whose traceback holds this frame, and with it the pool
        return None


def _replay(graph: Any, recording: gpu_peaks.Recording) -> None:
    graph.replay()
    recording.replayed()


@cache
def _side_stream(index: int) -> Any:
    """The stream on which a GPU's work is recorded. It is one for all: cuBLAS keeps a workspace for every stream."""
    import torch

    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


_IN_USE = "has_recordings"
"""Attribute of a memory pool in which work has been recorded."""
_pools: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def _shared_pool(index: int) -> Any:
    """The memory pool of a GPU's recordings, as long as there are any."""
    import torch

    pool = _pools.get(index)
    if pool is None:
        pool = _pools[index] = torch.cuda.MemPool()
    return pool


def _in_this_thread() -> Any:
    """Let backward passes run in the thread that calls them, inside.

    `use_mem_pool` is of one thread: in autograd's own, a backward pass would take its memory outside of the pool, where
    no recording uses it again, and a second workspace of cuBLAS.
    """
    import torch

    return torch.autograd.set_multithreading_enabled(False)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage inside, while a memory pool is in use.

    If the pool of an earlier recording were collected now, it would empty its cache. That ends the process while
    another pool takes memory (torch 2.11: `captures_underway.empty()`).
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def end_recording(pool: Any, stream: Any) -> None:
    """End what `torch.cuda.graph` leaves open where its own end fails (torch 2.11 and 2.13), as after work that waits.

    The pool would take no more work, the random numbers of the GPU could not be drawn, and the stream of the recording
    would stay the current one.

    Args:
        pool: id of the recording's memory pool.
        stream: the current one before.
    """
    import torch

    torch.cuda.set_stream(stream)
    index = torch.cuda.current_device()
    with contextlib.suppress(RuntimeError):  # where it was ended
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())  # the same numbers, outside of any recording
    free_memory("cuda")
