"""Inputs of LoRA's matrix products, left as they are where autocast would give their numbers back.

PEFT converts an adapter's input to the adapter's float32, and autocast converts that back to bfloat16: two passes over
all activations, and two more in the backward pass, for the very same bits. Each adapter also keeps a copy of its own of
the input, where q, k and v could share one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextlib.contextmanager
def as_they_are(model: nn.Module) -> Iterator[None]:
    """Inside, plain LoRA layers of `model` convert no input that has autocast's dtype already.

    Layers with dropout keep the conversion: it decides in which dtype they drop. So do DoRA and other variants.
    """
    from peft.tuners.lora.layer import Linear
    from torch.nn import Dropout

    layers: list[Any] = [
        module
        for module in model.modules()
        if type(module) is Linear
        and not module.lora_variant
        and not any(isinstance(dropout, Dropout) for dropout in module.lora_dropout.values())
    ]
    for layer in layers:
        layer._cast_input_dtype = partial(_cast, layer._cast_input_dtype)  # noqa: SLF001 - where PEFT converts
    try:
        yield
    finally:
        for layer in layers:
            del layer._cast_input_dtype  # noqa: SLF001


def _cast(usual: Any, x: Tensor | None, dtype: Any) -> Any:
    import torch

    if (
        x is not None
        and torch.is_autocast_enabled(x.device.type)
        and x.dtype == torch.get_autocast_dtype(x.device.type)
    ):
        return x
    return usual(x, dtype)
