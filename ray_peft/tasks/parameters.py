"""Counting weights, casting them, and giving adapters theirs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.errors import TrialFailed
from ray_peft.methods.base import Dtype
from ray_peft.spec import TrialSpec

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


@dataclass(frozen=True)
class WeightStorage:
    """How a model's weights are stored in memory."""

    num_bytes: dict[str, int]
    """By storage, such as {"nf4": 1, "bfloat16": 2}; 4-bit weights include their scales."""
    four_bit_share: float
    """Share of the weights that are in 4 bits, or of a base in 8 bits in those, each counted once."""


def weight_storage(model: nn.Module) -> WeightStorage:
    """How the frozen and trained weights of `model` are stored."""
    num_bytes: dict[str, int] = {}
    numbers = quantised = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = _bytes(parameter)
        kind = str(parameter.dtype).removeprefix("torch.")
        count = parameter.numel()
        if state is not None:
            kind, count = state.quant_type, math.prod(state.shape)
            size += sum(_bytes(value) for value in _constants(state))
            quantised += count
        elif hasattr(parameter, "SCB"):
            size += 4 * parameter.shape[0]  # a float32 scale of each row, which the layer holds
            quantised += count
        numbers += count
        num_bytes[kind] = num_bytes.get(kind, 0) + size
    return WeightStorage(num_bytes, quantised / numbers if numbers else 0.0)


def computed_in(spec: TrialSpec, model: nn.Module) -> set[str]:
    """The dtypes that round what `model` computes: of its weights, of its 4-bit products, of the trial's precision."""
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    if any(hasattr(parameter, "quant_state") for parameter in model.parameters()):
        kinds |= {spec.model.dtype} | ({spec.quantization.compute_dtype} if spec.quantization else set())
    if "int8" in kinds:  # what its layers take is rounded to 8 bits, on the way to it to float16
        kinds = kinds - {"int8"} | {"float16"}
    return kinds | ({"bfloat16"} if spec.train.precision == "bf16" else set())


def _constants(state: Any) -> Iterator[Tensor]:
    """The scales of a 4-bit weight, and with double quantisation the scales of these."""
    yield state.absmax
    if state.nested:
        yield state.state2.absmax
        yield state.state2.code


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def stored(name: str, weight: Tensor, dtype: Dtype) -> Tensor:
    """A weight as it is written: in `dtype`, where it is a floating-point number.

    Raises:
        TrialFailed: it is beyond the range of `dtype`.
    """
    import torch

    converted = weight.detach().to(getattr(torch, dtype)) if weight.is_floating_point() else weight.detach()
    if dtype == "float16" and converted.is_floating_point() and converted.isinf().any():
        raise TrialFailed(f"{name} has values above 65,504, the largest of float16; save it in bfloat16 or float32")
    return converted


def load_adapter(model: nn.Module, folder: Path, device: str) -> None:
    """Give an attached adapter the weights that PEFT has written to a folder."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_peft_model_state_dict(model, load_peft_weights(str(folder), device=device))
