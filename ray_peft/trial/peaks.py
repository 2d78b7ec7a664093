"""Peak memory of one trial [GiB]: torch's allocator, the whole GPU, and the process."""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field, fields

from ray_peft.engine import gpu_peaks
from ray_peft.foundation import nvml
from ray_peft.foundation.units import GIB


@dataclass
class Peaks:
    """Peak memory of a phase [GiB]; None where the device has no such number."""

    allocated_gib: float | None = None
    reserved_gib: float | None = None
    device_used_gib: float | None = None
    rss_gib: float | None = None
    spilled_gib: float | None = None


def larger_peaks(first: Peaks, second: Peaks) -> Peaks:
    """Of each kind the larger of two."""
    names = [kind.name for kind in fields(Peaks)]
    return Peaks(**{name: _larger(getattr(first, name), getattr(second, name)) for name in names})


def spilled(reserved_gib: float, total_gib: float) -> float:
    """GiB of the allocator's segments beyond the card's own memory.

    Drivers for Windows move them to the host's memory in place of an out-of-memory error, at the speed of PCIe.
    """
    return max(0.0, reserved_gib - total_gib)


@dataclass
class MemoryWatch:
    """Peak memory between `start` and `stop`, which may be called in turn; the peak is over all spans."""

    device: str
    peaks: Peaks = field(default_factory=Peaks)
    _sampler: _Sampler | None = None

    def start(self) -> None:
        """Forget earlier peaks of the allocator and begin to sample.

        Peaks are reset after loading, so that the number compares methods and not checkpoint formats.
        """
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            gpu_peaks.restart()
        self._sampler = _Sampler(self.device)
        self._sampler.start()

    def stop(self) -> None:
        """Fold the span's peaks into `peaks`."""
        if self._sampler is None:
            return
        self._sampler.finish()
        self._fold(*self._sampler.peaks())
        self._sampler = None

    def so_far(self) -> Peaks:
        """The peaks up to now, of a span that goes on."""
        if self._sampler is not None:
            self._fold(*self._sampler.peaks())
        return self.peaks

    def _fold(self, used: float | None, rss: float) -> None:
        self.peaks.device_used_gib = _larger(self.peaks.device_used_gib, used)
        self.peaks.rss_gib = _larger(self.peaks.rss_gib, rss)
        if self.device.startswith("cuda"):
            import torch

            self.peaks.allocated_gib = _larger(self.peaks.allocated_gib, gpu_peaks.allocated() / GIB)
            reserved = gpu_peaks.reserved() / GIB
            self.peaks.reserved_gib = _larger(self.peaks.reserved_gib, reserved)
            total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GIB
            self.peaks.spilled_gib = _larger(self.peaks.spilled_gib, spilled(reserved, total))


class _Sampler(threading.Thread):
    """Samples what no library keeps a peak of: the process's resident memory, and the whole GPU through NVML."""

    INTERVAL_S = 0.1
    GPU_EVERY = 10
    """Samples between two of the GPU: the driver serves no launches while it answers."""

    def __init__(self, device: str) -> None:
        super().__init__(daemon=True, name="memory-sampler")
        self._ending = threading.Event()
        self._gpu = nvml.handle() if device.startswith("cuda") else None
        self._used = 0
        self._rss = 0

    def run(self) -> None:
        import psutil

        process = psutil.Process()
        for sample in itertools.count():
            self._rss = max(self._rss, process.memory_info().rss)
            if self._gpu is not None and sample % self.GPU_EVERY == 0:
                self._used = max(self._used, nvml.used_bytes(self._gpu))
            if self._ending.wait(self.INTERVAL_S):
                return

    def finish(self) -> None:
        """Stop sampling."""
        self._ending.set()
        self.join()

    def peaks(self) -> tuple[float | None, float]:
        """Peaks so far [GiB]: the whole GPU (None without NVML), resident memory."""
        return (self._used / GIB if self._gpu is not None else None), self._rss / GIB


def _larger(first: float | None, second: float | None) -> float | None:
    known = [value for value in (first, second) if value is not None]
    return max(known) if known else None
