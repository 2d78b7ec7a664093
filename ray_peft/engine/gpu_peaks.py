"""Peak memory of torch's allocator in this process, with the tensors of recorded work while it is replayed.

torch counts the tensors of a CUDA graph while it is recorded, and none when it is replayed, though the graph needs
their memory each time. Without them, a method whose optimizer makes its state after the recording would look smaller.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Recording:
    """What recorded work needs on a GPU."""

    bytes: int = 0
    """Its tensors at their peak, beside those that were there before."""
    replays: int = 0

    def replayed(self) -> None:
        """Count a replay. To ask torch for its bytes takes 0.1 ms, so only replays 1, 2, 4, 8 and so on do so."""
        import torch

        self.replays += 1
        if self.replays & (self.replays - 1) == 0:
            _peaks.allocated = max(_peaks.allocated, torch.cuda.memory_allocated() + self.bytes)


@dataclass
class _Peaks:
    """Bytes since `restart`, but for those since torch's own peaks were restarted."""

    allocated: int = 0
    reserved: int = 0


_peaks = _Peaks()


def restart() -> None:
    """Forget the peaks so far, here and in torch."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    _peaks.allocated = _peaks.reserved = 0


def allocated() -> int:
    """Most bytes of tensors since `restart`."""
    import torch

    return max(_peaks.allocated, torch.cuda.max_memory_allocated())


def reserved() -> int:
    """Most bytes of the allocator's segments since `restart`."""
    import torch

    return max(_peaks.reserved, torch.cuda.max_memory_reserved())


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """Measure what the work that is recorded inside needs."""
    import torch

    _peaks.allocated, _peaks.reserved = allocated(), reserved()
    torch.cuda.reset_peak_memory_stats()
    measured, before = Recording(), torch.cuda.memory_allocated()
    try:
        yield measured
    finally:
        measured.bytes = torch.cuda.max_memory_allocated() - before
