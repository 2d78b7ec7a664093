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
from dataclasses import dataclass, field, fields
from pathlib import Path

from ray_peft.errors import TrialFailed
from ray_peft.foundation.units import GIB

FREE_WITHIN_S = 60.0
"""Longest wait for memory of a GPU that a trial before should have given back."""

PACKAGES = (
    "ray-peft", "ray", "torch", "transformers", "peft", "trl", "bitsandbytes", "galore-torch", "accelerate",
    "diffusers", "datasets", "mlflow", "lm-eval",
)  # fmt: skip


class Clock:
    """Wall seconds by phase."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.last = ""
        """The phase that is on, or that was the last."""
        self._since: float | None = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to phase `name`, also when it raises."""
        begin = time.perf_counter()
        self.last = name
        self._since = begin
        try:
            yield
        finally:
            self._since = None
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def so_far(self) -> dict[str, float]:
        """Seconds by phase, with those of the phase that is on."""
        on = 0.0 if self._since is None else time.perf_counter() - self._since
        return {**self.seconds, self.last: self.seconds.get(self.last, 0.0) + on} if on else dict(self.seconds)

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._begin


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
            torch.cuda.reset_peak_memory_stats()
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

    def finish(self) -> None:
        """Stop to sample."""
        self._done.set()
        self.join()

    def peaks(self) -> tuple[float | None, float]:
        """Peaks so far [GiB]: the whole GPU (None without NVML), resident memory."""
        return (self._used / GIB if self._gpu is not None else None), self._rss / GIB


@dataclass(frozen=True)
class GpuMemory:
    """A GPU as NVML sees it."""

    name: str
    total_gib: float
    free_gib: float


def gpu_memory(identity: str) -> GpuMemory | None:
    """Name and memory of a GPU without a CUDA context on it; None where NVML does not answer.

    Args:
        identity: an entry of CUDA_VISIBLE_DEVICES: an index, or a UUID.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        by = pynvml.nvmlDeviceGetHandleByIndex if identity.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID
        handle = by(int(identity) if identity.isdecimal() else identity)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name = pynvml.nvmlDeviceGetName(handle)
    except Exception:  # NVML raises its own family of errors
        return None
    return GpuMemory(name if isinstance(name, str) else name.decode(), memory.total / GIB, memory.free / GIB)


def wait_for_memory(device: str, needed_gib: float, context_gib: float) -> None:
    """Wait until `needed_gib` of the GPU are free, or this process's own: a trial that has ended may still hold some.

    Args:
        device: "cuda:N".
        needed_gib: what the trial takes, its CUDA context included.
        context_gib: what of it is the CUDA context, which this process has by now.

    Raises:
        TrialFailed: somebody holds it for longer than `FREE_WITHIN_S`.
    """
    import torch

    until = time.monotonic() + FREE_WITHIN_S
    while True:
        free, _ = torch.cuda.mem_get_info(device)
        found = (free + torch.cuda.memory_reserved(device)) / GIB + context_gib
        if found >= needed_gib:
            return
        if time.monotonic() > until:
            others = ", ".join(f"{pid} ({held:.1f} GiB)" for pid, held in gpu_holders())
            raise TrialFailed(
                f"needs {needed_gib:.1f} GiB of the GPU, but {found:.1f} GiB are free after {FREE_WITHIN_S:g} s"
                f"{f'; processes that hold memory: {others}' if others else ''}; end them, or use a "
                "smaller train.micro_batch_size"
            )
        time.sleep(0.25)


def gpu_holders() -> list[tuple[int, float]]:
    """Processes that hold memory of the current GPU: (pid, GiB), the largest first; empty where NVML does not say."""
    handle = _nvml_handle()
    if handle is None:
        return []
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        found = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        held = [(int(each.pid), (each.usedGpuMemory or 0) / GIB) for each in found]
        return sorted((each for each in held if each[0] != os.getpid()), key=lambda each: -each[1])
    return []


def _nvml_handle() -> object | None:
    """NVML's handle of the GPU that torch calls current; None where NVML does not answer."""
    import torch

    try:
        import pynvml

        pynvml.nvmlInit()
        # The UUID holds across CUDA_VISIBLE_DEVICES, an index does not.
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        handle: object = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception:  # NVML raises its own family of errors; the measurement is then None
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
    """The commit of this package's working tree, with "+dirty" where it was changed; None outside a repository."""
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
