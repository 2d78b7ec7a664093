"""Memory of the GPUs that are here, as NVML tells it: how much there is, what is free, and who holds it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from ray_peft.foundation.units import GIB


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


def gpu_holders() -> list[tuple[int, float]]:
    """Processes that hold memory of the current GPU: (pid, GiB), the largest first; empty where NVML does not say."""
    gpu = handle()
    if gpu is None:
        return []
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        found = pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)
        held = [(int(each.pid), (each.usedGpuMemory or 0) / GIB) for each in found]
        return sorted((each for each in held if each[0] != os.getpid()), key=lambda each: -each[1])
    return []


def handle() -> object | None:
    """NVML's handle of the GPU that torch calls current; None where NVML does not answer."""
    import torch

    try:
        import pynvml

        pynvml.nvmlInit()
        # The UUID holds across CUDA_VISIBLE_DEVICES, an index does not.
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        gpu: object = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception:  # NVML raises its own family of errors; the measurement is then None
        return None
    return gpu


def used_bytes(gpu: object) -> int:
    """What all processes hold of the GPU of a handle."""
    import pynvml

    return int(pynvml.nvmlDeviceGetMemoryInfo(gpu).used)
