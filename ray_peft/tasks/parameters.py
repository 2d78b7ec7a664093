"""Counting weights, casting them, and giving adapters theirs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ray_peft.errors import TrialFailed
from ray_peft.methods.base import Dtype

if TYPE_CHECKING:
    from torch import Tensor, nn


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Parameters that take gradients, and all parameters; each number of a 4-bit weight counts as one."""
    trained = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = math.prod(state.shape) if state is not None else parameter.numel()
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total


def stored(name: str, weight: Tensor, dtype: Dtype) -> Tensor:
    """A weight as it is written: in `dtype`, where it is a floating-point number.

    Raises:
        TrialFailed: it is beyond the range of `dtype`.
    """
    import torch

    found = weight.detach().to(getattr(torch, dtype)) if weight.is_floating_point() else weight.detach()
    if dtype == "float16" and found.is_floating_point() and found.isinf().any():
        raise TrialFailed(f"{name} has values above 65,504, the largest of float16; save it in bfloat16 or float32")
    return found


def load_adapter(model: nn.Module, folder: Path, device: str) -> None:
    """Give an attached adapter the weights that PEFT has written to a folder."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(folder), device=device))
