"""4-bit layers of bitsandbytes that compute the same on every CPU, or whose weights can be spread over workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def keep_as_stored(model: nn.Module) -> None:
    """Have every 4-bit layer of `model` leave its weights as they are and compute in its own `compute_dtype`.

    On a CPU with AVX512-BF16, `Linear4bit.forward` of bitsandbytes 0.50 repacks the weights in place in every
    evaluation, and then computes in bfloat16 whatever its `compute_dtype` is: the base would change while it is
    scored, scores would depend on the CPU, and shapes that its kernel does not know end in an AssertionError. A layer
    decides by its attribute `support_avx512bf16_for_cpu`, which is set when it is built.
    """
    import bitsandbytes

    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):  # type: ignore[attr-defined]  # not in __all__
            layer.support_avx512bf16_for_cpu = False


def as_plain_parameters(model: nn.Module, device: str) -> None:
    """Have every 4-bit layer of `model` hold its codes as a plain parameter of bfloat16 numbers, with the same bits.

    FSDP2 spreads plain tensors, and moves them to its device. What describes the numbers is moved here: it stays whole,
    as the layer's own `quant_state`, from which bitsandbytes' forward pass takes it
    (`fix_4bit_weight_quant_state_from_module`, made for FSDP). Codes in bytes could be spread with torch 2.13, but not
    with versions that make a parameter trainable before they freeze it.
    """
    import bitsandbytes
    import torch

    for layer in model.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):  # type: ignore[attr-defined]  # not in __all__
            weight: Any = layer.weight
            layer.quant_state = weight.quant_state
            weight.quant_state.to(device)
            codes = weight.data.as_subclass(torch.Tensor)
            as_floats = codes.flatten().view(torch.bfloat16)[:, None] if codes.numel() % 2 == 0 else codes
            layer.weight = torch.nn.Parameter(as_floats, requires_grad=False)
