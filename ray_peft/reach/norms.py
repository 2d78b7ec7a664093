"""The norms of a model, by the ends of their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray_peft.errors import ModelError
from ray_peft.reach.targets import endings, named_by

if TYPE_CHECKING:
    from torch import nn

ALL_NORMS = "all-norms"


def norms(targets: Sequence[str], model: nn.Module, *, of: str, key: str) -> tuple[str, ...]:
    """Whole names of the norms that `targets` mean.

    Args:
        targets: ends of names, regular expressions, or `all-norms`.
        model: on any device.
        of: the model as an error names it.
        key: the setting as an error names it.

    Raises:
        ModelError: one of them means none.
    """
    available = [
        name
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() and any(p.ndim == 1 for p in module.parameters(recurse=False))
    ]
    chosen: dict[str, None] = {}
    for target in targets:
        matched = [name for name in available if target == ALL_NORMS or named_by(target, name)]
        if not matched:
            raise ModelError(f"{key}: {target} is no norm of {of}; its norms end in {', '.join(endings(available))}")
        chosen |= dict.fromkeys(matched)
    return tuple(chosen)
