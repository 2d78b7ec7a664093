"""A UNet's linear layers in 4 bits, and back.

diffusers quantises on GPUs only, and adapters cannot be merged into its 4-bit weights; these lines do both anywhere.
The same layers are quantised: every `nn.Linear`. Convolutions stay as they are, since bitsandbytes has no 4-bit kernels
for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from ray_peft.methods.base import Quantization
from ray_peft.tasks.four_bit_layers import keep_as_stored

if TYPE_CHECKING:
    from torch import nn


def quantise(model: nn.Module, quantization: Quantization, device: str) -> None:
    """Store every linear layer of `model` in 4 bits; one layer at a time, so that the GPU never holds them all whole.

    Args:
        model: on the CPU.
        quantization: how.
        device: where the layers go; the rest of `model` stays where it is.
    """
    import bitsandbytes
    import torch

    compute = getattr(torch, quantization.compute_dtype)
    for parent, name, plain in list(_linears(model)):
        layer = bitsandbytes.nn.Linear4bit(  # type: ignore[attr-defined, no-untyped-call]  # not in __all__
            plain.in_features,
            plain.out_features,
            bias=plain.bias is not None,
            compute_dtype=compute,
            compress_statistics=quantization.double_quant,
            quant_type=quantization.quant_type,
            device="meta",
        )
        layer.weight = bitsandbytes.nn.Params4bit(  # type: ignore[attr-defined]  # not in __all__
            plain.weight.data,
            requires_grad=False,
            compress_statistics=quantization.double_quant,
            quant_type=quantization.quant_type,
        )
        layer.bias = plain.bias
        setattr(parent, name, layer.to(device))
    keep_as_stored(model)
    cast(Any, model).dequantize = lambda: dequantised(model)  # what methods/qlora.py calls before it merges


def dequantised(model: nn.Module) -> nn.Module:
    """`model` with plain linear layers that hold the numbers which its 4-bit layers compute with."""
    import bitsandbytes
    import torch

    for parent, name, layer in list(_linears(model)):
        if not isinstance(layer, bitsandbytes.nn.Linear4bit):  # type: ignore[attr-defined]
            continue
        stored: Any = layer.weight
        weight = bitsandbytes.functional.dequantize_4bit(stored.data, stored.quant_state)
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            plain.bias = torch.nn.Parameter(layer.bias.data.to(weight.dtype), requires_grad=False)
        setattr(parent, name, plain)
    return model


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """Every linear layer with its parent and its name there."""
    from torch import nn

    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                yield parent, name, child
