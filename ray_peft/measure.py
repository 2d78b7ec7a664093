"""Peak memory [GiB], wall time by phase [s] and provenance of one trial."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import platform
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

GIB = 2**30

PACKAGES = (
    "ray-peft", "ray", "torch", "transformers", "peft", "trl", "bitsandbytes", "galore-torch", "accelerate",
    "diffusers", "datasets", "mlflow", "lm-eval",
)  # fmt: skip


class Clock:
    """Wall seconds by phase."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to phase `name`, also when it raises."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._begin


@dataclass
class Peaks:
    """Peak memory of a phase [GiB]; null where the device has no such number."""

    allocated_gib: float | None = None
    reserved_gib: float | None = None
    device_used_gib: float | None = None
    rss_gib: float | None = None
    spilled_gib: float | None = None


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
            torch.cuda.reset_peak_memory_stats()
        self._sampler = _Sampler(self.device)
        self._sampler.start()

    def stop(self) -> None:
        """Fold the span's peaks into `peaks`."""
        if self._sampler is None:
            return
        used, rss = self._sampler.finish()
        self._sampler = None
        self.peaks.device_used_gib = _larger(self.peaks.device_used_gib, used)
        self.peaks.rss_gib = _larger(self.peaks.rss_gib, rss)
        if self.device.startswith("cuda"):
            import torch

            self.peaks.allocated_gib = _larger(self.peaks.allocated_gib, torch.cuda.max_memory_allocated() / GIB)
            reserved = torch.cuda.max_memory_reserved() / GIB
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
        self._done = threading.Event()
        self._gpu = _nvml_handle() if device.startswith("cuda") else None
        self._used = 0
        self._rss = 0

    def run(self) -> None:
        import psutil

        process = psutil.Process()
        for sample in itertools.count():
            self._rss = max(self._rss, process.memory_info().rss)
            if self._gpu is not None and sample % self.GPU_EVERY == 0:
                import pynvml

                self._used = max(self._used, int(pynvml.nvmlDeviceGetMemoryInfo(self._gpu).used))
            if self._done.wait(self.INTERVAL_S):
                return

    def finish(self) -> tuple[float | None, float]:
        """Peaks so far [GiB]: the whole GPU (null without NVML), resident memory."""
        self._done.set()
        self.join()
        return (self._used / GIB if self._gpu is not None else None), self._rss / GIB


def _nvml_handle() -> object | None:
    """NVML's handle of the GPU that torch calls current; null where NVML does not answer."""
    import torch

    try:
        import pynvml

        pynvml.nvmlInit()
        # The UUID holds across CUDA_VISIBLE_DEVICES, an index does not.
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        handle: object = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception:  # NVML raises its own family of errors; the measurement is then null
        return None
    return handle


def _larger(first: float | None, second: float | None) -> float | None:
    known = [value for value in (first, second) if value is not None]
    return max(known) if known else None


def versions() -> dict[str, str]:
    """Versions of Python, CUDA and the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    import torch

    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's model and the threads in use."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{model}, {torch.get_num_threads()} threads"


def git_commit() -> str | None:
    """The commit of this package's working tree, with "+dirty" where it was changed; null outside a repository."""
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, env=environment, timeout=10
        )
        changes = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, env=environment, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+dirty" if changes.stdout.strip() else "")
