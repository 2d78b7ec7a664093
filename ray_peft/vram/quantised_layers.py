"""Layers in 4 and 8 bits on the meta device, with the allocations of bitsandbytes 0.50 on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from torch.autograd import Function

from ray_peft.methods.base import Quantization

FLOAT = torch.float32


class Params4bit(nn.Parameter):
    """PEFT knows weights in 4 bits by the name of their class."""


class Int8Params(nn.Parameter):
    """The same in 8 bits."""


@dataclass(frozen=True)
class _Shape:
    """What code reads of bitsandbytes' quantisation state, beside that of a real one."""

    shape: tuple[int, int]
    dtype: torch.dtype
    quant_type: str = "nf4"
    nested: bool = False


def dequantize_4bit(packed: Tensor, state: _Shape, *_: Any, **__: Any) -> Tensor:
    """What the function of this name in bitsandbytes gives: the plain weight."""
    return packed.new_empty(state.shape, dtype=state.dtype)


def int8_vectorwise_dequant(codes: Tensor, *_: Any) -> Tensor:
    """What the function of this name in bitsandbytes gives: the plain weight, float32."""
    return torch.empty_like(codes, dtype=FLOAT)


class _MatMul4Bit(Function):
    """bitsandbytes 0.50's MatMul4Bit: dequantise for each product, keep nothing of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        ctx.packed, ctx.shape, ctx.dtype = packed, shape, dtype
        constants = x.new_empty(math.prod(shape) // 64, dtype=FLOAT)
        product: Tensor = F.linear(x, x.new_empty(shape))
        del constants
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        constants = grad.new_empty(math.prod(ctx.shape) // 64, dtype=FLOAT)
        product = torch.matmul(grad, grad.new_empty(ctx.shape, dtype=ctx.dtype).to(grad.dtype))
        del constants
        return product, None, None, None


class _MatMul8Bit(Function):
    """bitsandbytes 0.50's MatMul8bitLt with its threshold: keeps the input, and dequantises for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.stored = stored
        flat = x.reshape(-1, x.shape[-1])
        low = flat.to(torch.float16)
        codes, scales = torch.empty_like(low, dtype=torch.int8), low.new_empty(len(low), dtype=FLOAT)
        outliers = torch.empty_like(low, dtype=torch.bool)
        del low, outliers
        sums = codes.new_empty(len(codes), len(stored), dtype=torch.int32)
        product = torch.empty_like(sums, dtype=torch.float16)
        del sums
        out = x.new_empty(*x.shape[:-1], len(stored))
        del codes, scales, product
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,), (grad,) = ctx.saved_tensors, grads
        plain = ctx.stored.new_empty(ctx.stored.shape, dtype=x.dtype)
        return torch.matmul(grad.to(x.dtype).reshape(-1, grad.shape[-1]), plain).view(x.shape), None


def quantize(model: Any, how: Quantization, names: Iterable[str] | None = None) -> None:
    """Store the named layers of `model`, by default all linear ones, as bitsandbytes does."""
    from transformers.pytorch_utils import Conv1D

    if names is None:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in list(names):
        module = model.get_submodule(name)
        if isinstance(module, Conv1D):  # GPT-2's linear layer, whose matrix lies the other way round
            linear = nn.Linear(module.nx, module.nf, device="meta", dtype=module.weight.dtype)
            linear.bias = module.bias
            module = linear
        model.set_submodule(name, _in_eight_bits(module) if how.bits == 8 else quantized_linear(module, how))
    setattr(model, f"is_loaded_in_{how.bits}bit", True)  # what PEFT and diffusers ask for


def quantized_linear(linear: nn.Linear, how: Quantization) -> nn.Module:
    """`linear` as bitsandbytes stores it in 4 bits on a GPU, on the meta device.

    Two numbers a byte; for each 64 numbers a scale, in float32, or with double quantisation in 8 bits and for each 256
    scales one in float32 (Dettmers et al. 2023, arXiv:2305.14314, section 3).
    """
    import bitsandbytes

    class MetaLinear4bit(bitsandbytes.nn.Linear4bit):  # type: ignore[name-defined, misc]  # the class that PEFT knows
        def __init__(self) -> None:
            nn.Module.__init__(self)
            count = linear.weight.numel()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            packed: Any = Params4bit(linear.weight.new_empty((count + 1) // 2, 1, dtype=torch.uint8), False)
            packed.quant_state = _Shape((linear.out_features, linear.in_features), linear.weight.dtype)
            packed.compress_statistics, packed.quant_type = how.double_quant, how.quant_type  # PEFT reads them
            self.weight = packed
            self.bias = linear.bias
            self.compute_dtype = getattr(torch, how.compute_dtype)
            self.quant_state = packed.quant_state
            self._weight_dtype = linear.weight.dtype
            scales = -(-count // 64)
            scale_dtype = torch.uint8 if how.double_quant else FLOAT
            scale_buffers = {"scales": linear.weight.new_empty(scales, dtype=scale_dtype)}
            if how.double_quant:
                scale_buffers["scales_of_scales"] = linear.weight.new_empty(-(-scales // 256), dtype=FLOAT)
            for name, tensor in scale_buffers.items():
                self.register_buffer(name, tensor, persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            shape = (self.out_features, self.in_features)
            product: Tensor = _MatMul4Bit.apply(x.to(self.compute_dtype), self.weight, shape, self._weight_dtype)  # type: ignore[no-untyped-call]
            return product.to(x.dtype)

    return MetaLinear4bit()


def _in_eight_bits(linear: nn.Linear) -> nn.Module:
    """`linear` as bitsandbytes stores it in 8 bits: whole numbers, and a float32 scale of each row."""
    import bitsandbytes

    class MetaLinear8bitLt(bitsandbytes.nn.Linear8bitLt):  # type: ignore[name-defined, misc]  # the class that PEFT knows
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.in_features, self.out_features = linear.in_features, linear.out_features
            stored: Any = Int8Params(torch.empty_like(linear.weight, dtype=torch.int8), False)
            stored.CB, stored.SCB, stored.has_fp16_weights = None, None, False
            self.weight, self.bias, self.index = stored, linear.bias, None
            self.state = bitsandbytes.MatmulLtState()  # type: ignore[attr-defined]  # not in __all__
            self.state.threshold, self.state.has_fp16_weights = 6.0, False
            scales = linear.weight.new_empty(linear.out_features, dtype=FLOAT)
            self.register_buffer("scales", scales, persistent=False)
            self.state.SCB = scales

        def forward(self, x: Tensor) -> Tensor:
            product: Tensor = _MatMul8Bit.apply(x, self.weight)  # type: ignore[no-untyped-call]
            return product

    return MetaLinear8bitLt()
