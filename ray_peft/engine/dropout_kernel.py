"""The Triton kernel of keyed dropout; keyed_dropout.py says what it computes. It is imported on a GPU only."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found, unused-ignore]  # comes with torch for CUDA
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor

_BLOCKS = (1024, 512, 256)


def dropped(
    x: Tensor,
    keys: Tensor,
    layer: int,
    bound: int | Tensor,
    scale: float | Tensor,
    columns: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Drop numbers of `x` (row, feature), contiguous.

    Keys are (row,) int64, bound and scale numbers or (row,), columns (groups, feature) int64.
    """
    out = torch.empty_like(x, dtype=dtype)
    rows, features = x.shape
    if not x.numel():
        return out
    block = next((size for size in _BLOCKS if -features % size <= features // 4), _BLOCKS[-1])
    columns = None if columns is None else columns.contiguous()
    many, placed = isinstance(bound, Tensor), columns is not None
    _kernel[(rows, triton.cdiv(features, block))](
        x, out, keys,
        bound if many else keys, scale if many else keys, columns if placed else keys,
        0 if many else bound, 1.0 if many else scale, layer - 2**32 if layer >= 2**31 else layer,
        rows // len(columns) if columns is not None else rows, features,
        MANY=many, PLACED=placed, BLOCK=block,
    )  # fmt: skip
    return out


# Triton reads the annotations of what it compiles, so these two have none.


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _mixed(x):  # type: ignore[no-untyped-def]
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= x >> 15
    x *= 0x735A2D97
    x ^= x >> 15
    return x


@triton.jit(do_not_specialize=["bound", "layer", "group"])  # type: ignore[untyped-decorator, unused-ignore]
def _kernel(  # type: ignore[no-untyped-def]
    x, out, keys, bounds, scales, columns, bound, scale, layer, group, features,
    MANY: tl.constexpr, PLACED: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803 - Triton's own way
):  # fmt: skip
    row = tl.program_id(0)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = feature < features
    key = tl.load(keys + row)
    upper = _mixed(key.to(tl.uint32) ^ layer.to(tl.uint32, bitcast=True))
    lower = _mixed((key >> 32).to(tl.uint32) ^ upper)
    number = feature.to(tl.uint32)
    if PLACED:
        number = tl.load(columns + (row // group).to(tl.int64) * features + feature, mask=there, other=0).to(tl.uint32)
    hashed = _mixed(_mixed(number ^ upper) + lower) ^ 0x80000000
    if MANY:
        bound = tl.load(bounds + row)
        scale = tl.load(scales + row)
    keeps = hashed.to(tl.int32, bitcast=True) >= bound
    at = row.to(tl.int64) * features + feature
    values = tl.load(x + at, mask=there, other=0.0)
    values = tl.where(keeps, values.to(tl.float32) * scale, 0.0)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=there)
