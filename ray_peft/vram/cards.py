"""Known GPUs: their memory, and the part of it that a trial's tensors cannot use."""

from __future__ import annotations

from dataclasses import dataclass

from ray_peft.foundation.units import GIB, MIB


@dataclass(frozen=True)
class Gpu:
    """One kind of card."""

    name: str
    memory_gib: float
    context: int = 600 * MIB
    """CUDA context, kernels and libraries of one process, outside of torch's allocator."""
    workspace: int = 104 * MIB
    """What cuBLAS takes from the allocator: one workspace per thread and library, 32 MiB each on Hopper and 8.1 MiB
    before it (torch's CUBLAS_WORKSPACE_CONFIG). 104 MiB is the rest of four measured peaks on an H200."""
    slack: float = 0.08
    """What the allocator reserves beyond the tensors' peak, as a share of it (measured on an H200: 0.05 to 0.08)."""
    slack_uneven: float = 0.05
    """Added to `slack` where passes differ in size."""
    margin: int = 256 * MIB
    """Kept free, so that what is said to fit fits."""

    def holds(self, needed: int, *, memory_gib: float | None = None) -> bool:
        """Whether a process that needs `needed` bytes for tensors fits, alone, on the card or on `memory_gib` of it."""
        return self.footprint(needed) <= (self.memory_gib if memory_gib is None else memory_gib) * GIB

    def footprint(self, needed: int) -> int:
        """Bytes of the card that a process takes, with all that is not tensors, and the margin."""
        return needed + self.context + self.margin


_EARLIER = 32 * MIB  # 3 x 8.1 MiB and some

KNOWN = (
    Gpu("Tesla T4", 15.0, workspace=_EARLIER),
    Gpu("Tesla V100-SXM2-16GB", 16.0, workspace=_EARLIER),
    Gpu("Tesla V100-SXM2-32GB", 32.0, workspace=_EARLIER),
    Gpu("NVIDIA GeForce RTX 3060", 12.0, workspace=_EARLIER),
    Gpu("NVIDIA GeForce RTX 3090", 24.0, workspace=_EARLIER),
    Gpu("NVIDIA GeForce RTX 4070", 12.0, workspace=_EARLIER),
    Gpu("NVIDIA GeForce RTX 4090", 24.0, workspace=_EARLIER),
    Gpu("NVIDIA A10", 22.5, workspace=_EARLIER),
    Gpu("NVIDIA L4", 22.5, workspace=_EARLIER),
    Gpu("NVIDIA L40S", 44.5, workspace=_EARLIER),
    Gpu("NVIDIA A100-SXM4-40GB", 39.5, workspace=_EARLIER),
    Gpu("NVIDIA A100-SXM4-80GB", 79.0, workspace=_EARLIER),
    Gpu("NVIDIA H100 80GB HBM3", 79.0),
    Gpu("NVIDIA H200", 139.5),
)
"""The memory is what the driver reports. It is less than the name says where the card corrects its memory's errors."""

ANY = Gpu("any GPU", 12.0)
"""A card of which only the memory is known, which the caller gives."""


def here(device: str) -> Gpu:
    """The card of "cuda:N"."""
    import torch

    return known(torch.cuda.get_device_name(device))


def known(name: str) -> Gpu:
    """The card of that name, as torch and the driver write it; else one with the safest numbers."""
    exact = {gpu.name.lower(): gpu for gpu in KNOWN}
    if name.lower() in exact:
        return exact[name.lower()]
    similar = [gpu for gpu in KNOWN if name.lower().startswith(gpu.name.lower())]
    return max(similar, key=lambda gpu: len(gpu.name)) if similar else ANY
