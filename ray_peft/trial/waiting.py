"""Waits until the trial before has given back the GPU's memory."""

from __future__ import annotations

import time

from ray_peft.errors import TrialFailed
from ray_peft.foundation.nvml import gpu_holders
from ray_peft.foundation.units import GIB

FREE_WITHIN_S = 60.0
"""Longest wait for memory of a GPU that a trial before should have given back."""


def wait_for_memory(device: str, needed_gib: float, context_gib: float) -> None:
    """Wait until `needed_gib` of the GPU are free, or this process's own: a trial that has ended may still hold some.

    Args:
        device: "cuda:N".
        needed_gib: what the trial takes, its CUDA context included.
        context_gib: the part of it that is the CUDA context, which this process has already.

    Raises:
        TrialFailed: other processes hold the memory for longer than `FREE_WITHIN_S`.
    """
    import torch

    until = time.monotonic() + FREE_WITHIN_S
    while True:
        free, _ = torch.cuda.mem_get_info(device)
        free_gib = (free + torch.cuda.memory_reserved(device)) / GIB + context_gib
        if free_gib >= needed_gib:
            return
        if time.monotonic() > until:
            others = ", ".join(f"{pid} ({used_gib:.1f} GiB)" for pid, used_gib in gpu_holders())
            raise TrialFailed(
                f"needs {needed_gib:.1f} GiB of the GPU, but {free_gib:.1f} GiB are free after {FREE_WITHIN_S:g} s"
                f"{f'; processes that hold memory: {others}' if others else ''}; end them, or use a "
                "smaller train.micro_batch_size"
            )
        time.sleep(0.25)
