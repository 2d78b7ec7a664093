"""Counting weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters that take gradients, and all parameters; each number of a 4-bit weight counts as one."""
    trained = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = math.prod(state.shape) if state is not None else parameter.numel()
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total
