"""Where and with what a result is made: packages, device and commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = (
    "ray-peft", "ray", "torch", "transformers", "peft", "trl", "bitsandbytes", "galore-torch", "accelerate",
    "diffusers", "datasets", "mlflow", "lm-eval",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of Python, CUDA and the packages that decide a result."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    import torch

    if torch.version.cuda:
        installed["cuda"] = torch.version.cuda
    return installed


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's model and the threads in use."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return cpu_name(torch.get_num_threads())


def cpu_name(threads: int) -> str:
    """The model of this machine's CPU, and the threads of torch in use."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{model}, {threads} threads"


def gpu_number(device: str) -> str | None:
    """Which of the machine's GPUs a device of this process is: a process may be shown some of them only.

    Args:
        device: "cpu", or "cuda:N" with N counted among the GPUs that this process sees.
    """
    if not device.startswith("cuda"):
        return None
    place = int(device.partition(":")[2] or 0)
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[place] if place < len(visible) else str(place)


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
