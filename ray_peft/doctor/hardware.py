"""Probes of what computes: the system, GPUs, torch and bitsandbytes."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import platform
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ray_peft.doctor.findings import Finding, Probe, guarded
from ray_peft.foundation.units import GIB

if TYPE_CHECKING:
    import torch

CUDA_BUILDS = (130, 128, 126)
"""CUDA versions that torch is built for, as in cu130, the newest first."""


@dataclass(frozen=True)
class GpuFacts:
    """One NVIDIA GPU as the driver sees it."""

    name: str
    total_gib: float
    free_gib: float
    capability: tuple[int, int]


def _python() -> list[Finding]:
    version = platform.python_version()
    if sys.version_info >= (3, 15):
        return [Finding("Python", version, "note", "requirements.lock was made for Python 3.11 to 3.14.")]
    return [Finding("Python", version)]


def _system() -> list[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    limit = Path("/sys/fs/cgroup/memory.max")
    total = memory.total
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        total = min(total, int(text))
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    value = f"{total / GIB:.1f} GiB, {min(memory.available, total) / GIB:.1f} GiB available"
    system, size = Finding("system", platform.platform()), Finding("memory", value)
    if sys.platform != "linux":
        system = replace(system, level="note", advice="Training on GPUs is tested on Linux only.")
    if total < 8 * GIB:
        size = replace(size, level="note", advice="Ray and one trial want about 8 GiB.")
    return [system, Finding("CPU cores", str(cores)), size]


def _torch() -> list[Finding]:
    import torch

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return [Finding("torch", f"{torch.__version__}, built for {built_for}")]


def _gpus() -> list[Finding]:
    """The GPUs that the driver shows (NVML), else those that PyTorch shows, and whether PyTorch can compute on them."""
    import torch

    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    driver, gpus = _gpus_from_driver() or ("", _gpus_from_torch(usable))
    if not gpus:
        return [Finding("GPUs", "none", "note", "Trials run on the CPU, which is right for small models only.")]
    findings = [_describe(index, gpu, driver) for index, gpu in enumerate(gpus)]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    value = f"{usable} of {len(gpus)}" + ("" if hidden is None else f", CUDA_VISIBLE_DEVICES={hidden}")
    if usable == 0 and hidden is None:
        return [*findings, Finding("GPUs for torch", value, "problem", _cuda_build())]
    findings.append(Finding("GPUs for torch", value, "ok" if usable == len(gpus) else "note"))
    for index in range(usable):
        findings += guarded(f"cuda:{index}", functools.partial(_try, index))
    return findings


def _cuda_build() -> str:
    """What to do where the driver shows GPUs that torch cannot use."""
    import pynvml
    import torch

    try:
        number = pynvml.nvmlSystemGetCudaDriverVersion_v2()  # 12080 is CUDA 12.8
        newest = number // 1000 * 10 + number % 1000 // 10
    except pynvml.NVMLError:
        newest = CUDA_BUILDS[0]
    build = next((version for version in CUDA_BUILDS if version <= newest), None)
    if build is None:
        return f"This driver is for CUDA {newest / 10:g}; torch needs {CUDA_BUILDS[-1] / 10:g} or later: update it."
    if torch.version.cuda:
        return "torch is built for CUDA and finds no GPU: is the driver newer than the running kernel's? Restart."
    release = torch.__version__.partition("+")[0]
    return (
        "This torch is built for CPUs. Install the one for this driver: python -m pip install --force-reinstall "
        f"torch=={release} --index-url https://download.pytorch.org/whl/cu{build}"
    )


def _gpus_from_driver() -> tuple[str, list[GpuFacts]] | None:
    """The driver's version and its GPUs; None without a driver, or where it does not tell (some unified memory)."""
    import pynvml

    try:
        pynvml.nvmlInit()
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            name = pynvml.nvmlDeviceGetName(handle)
            gpus.append(GpuFacts(name, memory.total / GIB, memory.free / GIB, (major, minor)))
        return pynvml.nvmlSystemGetDriverVersion(), gpus
    except pynvml.NVMLError:
        return None


def _gpus_from_torch(count: int) -> list[GpuFacts]:
    import torch

    gpus = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        gpus.append(GpuFacts(name, total / GIB, free / GIB, capability))
    return gpus


def _describe(index: int, gpu: GpuFacts, driver: str) -> Finding:
    value = (
        f"{gpu.name}, {gpu.total_gib:.1f} GiB, {gpu.free_gib:.1f} GiB free, "
        f"compute capability {gpu.capability[0]}.{gpu.capability[1]}" + (f", driver {driver}" if driver else "")
    )
    if gpu.free_gib < 0.8 * gpu.total_gib:
        return Finding(f"GPU {index}", value, "note", "Other programs hold memory that trials will lack.")
    return Finding(f"GPU {index}", value)


def _try(index: int) -> list[Finding]:
    """Compute a small product on GPU number `index` of PyTorch."""
    import torch

    ones = torch.ones(16, 16, device=f"cuda:{index}")
    correct = bool((ones @ ones == 16).all())
    return [] if correct else [Finding(f"cuda:{index}", "a 16x16 product is wrong", "problem", "Do not train on it.")]


def _bfloat16() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        advice = "Fast only on CPUs with bfloat16 instructions (AMX, AVX512-BF16); others want float32."
        return [Finding("bfloat16", "computed on the CPU", "note", advice)]
    lacking = [i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_capability(i) < (8, 0)]
    if lacking:
        advice = "Set the dtype to float16 or float32: bfloat16 needs compute capability 8.0."
        return [Finding("bfloat16", f"not on GPU {', '.join(map(str, lacking))}", "note", advice)]
    return [Finding("bfloat16", "on every GPU")]


def _bitsandbytes() -> list[Finding]:
    import torch

    # bitsandbytes reports on stdout what it could not load; the product below says whether that matters.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import bitsandbytes

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        error = _four_bit_error(device)
    value = f"{bitsandbytes.__version__}, 4-bit product on {device.type}: relative error {error:.2f}"
    if not error < 0.25:  # NF4 of normal weights errs by about 0.09; NaN fails too
        return [Finding("bitsandbytes", value, "problem", "QLoRA will not train on this device.")]
    if device.type == "cpu":
        slower = _four_bit_slowdown()
        advice = f"A 4-bit layer takes {slower:.1f} times as long as a float32 one, measured now (256 x 1024 x 1024)."
        return [Finding("bitsandbytes", value, "note", advice)]
    return [Finding("bitsandbytes", value)]


def _four_bit_error(device: torch.device) -> float:
    """Relative error of x W^T with W in NF4, for W of 128 x 128 standard normal numbers."""
    import bitsandbytes
    import torch

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 128, generator=generator).to(device)
    x = torch.randn(8, 128, generator=generator).to(device)
    stored, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    product = bitsandbytes.matmul_4bit(x, stored.t(), quant_state=state)  # type: ignore[attr-defined]  # not in __all__
    exact = x @ weight.t()
    return float((product - exact).norm() / exact.norm())


def _four_bit_slowdown() -> float:
    """Time of a pass forward and backward through a 4-bit layer on the CPU, over that through a float32 one.

    Both layers are of 1024 x 1024, the input is of 256 rows; the best of five passes each.
    """
    import bitsandbytes
    import torch

    plain = torch.nn.Linear(1024, 1024, bias=False)
    stored = bitsandbytes.nn.Linear4bit(  # type: ignore[attr-defined, no-untyped-call]  # not in __all__
        1024, 1024, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    stored.load_state_dict(plain.state_dict())
    stored = stored.to("cpu")  # quantises
    x = torch.randn(256, 1024, requires_grad=True)

    def seconds(layer: torch.nn.Module) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            layer(x).sum().backward()
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(stored) / seconds(plain.requires_grad_(False))


PROBES: tuple[tuple[str, Probe], ...] = (
    ("Python", _python),
    ("system", _system),
    ("torch", _torch),
    ("GPUs", _gpus),
    ("bfloat16", _bfloat16),
    ("bitsandbytes", _bitsandbytes),
)
