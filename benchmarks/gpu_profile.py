"""Where a GPU's time goes between two moments: the share in which it works, its gaps by length, its kernels by time."""

from __future__ import annotations

from collections import Counter
from typing import Any

GAPS_US = (2, 10, 100, 1000)
"""Bounds of the classes of gaps [us]. Within a replayed graph, kernels follow each other in 1 to 2 us."""
SHOWN = 14


def summary(profile: Any, steps: int) -> dict[str, Any] | None:
    """What a profile of CUDA activities shows; None if nothing ran.

    Args:
        profile: torch's, stopped.
        steps: optimizer steps that it spans.
    """
    from torch.autograd import DeviceType

    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profile.events()
        if event.device_type == DeviceType.CUDA
    )
    if not spans:
        return None
    busy, reached, before = 0.0, spans[0][0], ""
    by_kernel: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    idle: Counter[str] = Counter()
    gaps: list[tuple[float, str, str]] = []
    for start, end, name in spans:
        if start > reached:
            idle[_class_of(start - reached)] += start - reached
            gaps.append((round(start - reached, 1), before[:60], name[:60]))
        busy += max(0.0, end - max(start, reached))
        by_kernel[name] += end - start
        calls[name] += 1
        if end > reached:
            reached, before = end, name
    whole = reached - spans[0][0]
    return {
        "busy": busy / whole,
        "ms_a_step": whole / 1000 / steps,
        "kernels_a_step": len(spans) / steps,
        "idle_by_gap_us": {name: round(size / whole, 4) for name, size in idle.items()},
        "longest_gaps_us": sorted(gaps, reverse=True)[:SHOWN],
        "kernels": [
            {"name": name[:110], "share": round(size / whole, 4), "calls_a_step": calls[name] / steps}
            for name, size in by_kernel.most_common(SHOWN)
        ],
    }


def _class_of(gap: float) -> str:
    return next((f"below {bound}" for bound in GAPS_US if gap < bound), f"{GAPS_US[-1]} and more")
