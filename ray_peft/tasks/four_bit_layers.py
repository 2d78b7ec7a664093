"""4-bit layers of bitsandbytes that compute the same on every CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
