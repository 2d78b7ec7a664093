"""Dropout whose mask is a hash of a key, the layer and the position, so that it can be recomputed.

A key is a number of 64 bits that belongs to a token (or to a whole row), wherever it lies in a pass. So a token has the
same mask in any lane, pass, worker or recomputation, and nothing but the key is stored for the backward pass. On a GPU
one Triton kernel computes it, elsewhere integer arithmetic on tensors, with equal bits.

The hash is two rounds of lowbias32 (C. Wellons, github.com/skeeto/hash-prospector, issue 19), with the key added
between them; keys are made with the finaliser of splitmix64 (Steele, Lea and Flood 2014, doi:10.1145/2714064.2660195).
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

logger = logging.getLogger(__name__)

MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)
"""Of lowbias32, for products modulo 2**32."""
_BLOCK = 2**16
"""Numbers whose hash is computed at a time on a CPU: they stay in its cache."""


def row_key(seed: int, step: int, row: int) -> int:
    """The key of a row in an optimizer step, in the range of int64.

    Args:
        seed: of the trial.
        step: counted over the whole trial.
        row: its place in the step, over all passes and workers.
    """
    digest = hashlib.blake2b(f"{seed}:{step}:{row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def placed(keys: Tensor, places: Tensor) -> Tensor:
    """Keys of places (such as positions of tokens) inside what `keys` stand for; int64, the two broadcast."""
    key = keys + (places + 1) * _signed(0x9E3779B97F4A7C15)
    key = (key ^ _shifted(key, 30)) * _signed(0xBF58476D1CE4E5B9)
    key = (key ^ _shifted(key, 27)) * _signed(0x94D049BB133111EB)
    return key ^ _shifted(key, 31)


def layer_number(name: str, call: int = 0) -> int:
    """The number of a place in a model that drops: `call` counts the dropouts that module `name` itself calls."""
    return zlib.crc32(f"{name}:{call}".encode())


def keyed_dropout(
    x: Tensor,
    p: float | Tensor,
    keys: Tensor,
    layer: int,
    columns: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`x` with a share `p` of its numbers zeroed, the others divided by 1 - p.

    Args:
        x: of any floating dtype; its first dimensions are those of `keys`, and the others, flattened, are the features.
        p: the probability, at least 0 and below 1; a tensor broadcasts to `keys`, such as (lane, 1) for one each lane.
        keys: int64; of each token (lane, token), or of each row (row,).
        layer: of 32 bits; layers differ in their masks (`layer_number`).
        columns: int64 (n, features), numbers that stand for the features' places, for as many equal groups of keys,
            one after the other; by default 0, 1, 2, ...
        dtype: of the result; None is that of `x`.

    Raises:
        ValueError: the shapes do not fit.
    """
    if not isinstance(p, Tensor) and p == 0:
        return x if dtype is None else x.to(dtype)
    if keys.shape != x.shape[: keys.dim()] or keys.dim() == x.dim():
        raise ValueError(f"dropout: keys of shape {tuple(keys.shape)} do not begin the shape {tuple(x.shape)}")
    if isinstance(p, Tensor):
        share = p.float().double().expand(keys.shape).reshape(-1)
        bound: Any = ((share * 2**32).round() - 2**31).to(torch.int32)
        scale: Any = (1 / (1 - share)).float()
    else:
        bound, scale = _bound_and_scale(p)
    dropped: Tensor = _Dropped.apply(x, keys, layer & 0xFFFFFFFF, bound, scale, columns, dtype or x.dtype)  # type: ignore[no-untyped-call]
    return dropped


class _Dropped(Function):
    """Stores only the keys; the backward pass drops the same places of the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        keys: Tensor,
        layer: int,
        bound: Any,
        scale: Any,
        columns: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.dtype = x.dtype
        ctx.layer, ctx.many = layer, isinstance(bound, Tensor)
        ctx.bound, ctx.scale = (None, None) if ctx.many else (bound, scale)
        ctx.save_for_backward(keys, columns, *((bound, scale) if ctx.many else ()))
        return _dropped(x, keys, layer, bound, scale, columns, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        keys, columns, *of_keys = ctx.saved_tensors
        bound, scale = of_keys if ctx.many else (ctx.bound, ctx.scale)
        return _dropped(grads[0], keys, ctx.layer, bound, scale, columns, ctx.dtype), *([None] * 6)


def _dropped(
    x: Tensor, keys: Tensor, layer: int, bound: Any, scale: Any, columns: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if x.device.type == "meta":
        return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    flat = x.contiguous().view(keys.numel(), -1)
    kernel = _kernel() if x.is_cuda and x.dtype != torch.float64 else None
    work = _computed if kernel is None else kernel
    return work(flat, keys.reshape(-1), layer, bound, scale, columns, dtype).view(x.shape)


@cache
def _kernel() -> Any:
    """The Triton kernel; None where it cannot be compiled: tensors then do the same arithmetic, slower."""
    try:
        from ray_peft.engine.dropout_kernel import dropped

        sample = torch.ones(1, 1, device="cuda")
        dropped(sample, torch.zeros(1, dtype=torch.int64, device="cuda"), 0, 0, 1.0, None, sample.dtype)
    except Exception as error:  # noqa: BLE001 - no Triton, no compiler, a driver that does not fit
        logger.warning("dropout runs without its kernel, which is slower: %s: %s", type(error).__name__, error)
        return None
    return dropped


def _computed(
    x: Tensor,
    keys: Tensor,
    layer: int,
    bound: int | Tensor,
    scale: float | Tensor,
    columns: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As the kernel does; x (row, feature), keys (row,), bound and scale numbers or (row,)."""
    out = torch.empty_like(x, dtype=dtype)
    upper = _mixed(keys.to(torch.int32) ^ _signed32(layer))
    lower = _mixed((keys >> 32).to(torch.int32) ^ upper)
    numbers = columns if columns is not None else torch.arange(x.shape[1], device=x.device)[None]
    numbers = numbers.to(torch.int32)
    group = len(x) // len(numbers)
    size = max(1, _BLOCK // max(x.shape[1], 1)) if x.device.type == "cpu" else len(x)
    for begin in range(0, len(x), size):
        rows = slice(begin, begin + size)
        if len(numbers) == 1:
            hashed = numbers ^ upper[rows, None]
        else:
            hashed = numbers[torch.arange(len(x), device=x.device)[rows] // group] ^ upper[rows, None]
        hashed = _mixed(_mixed(hashed).add_(lower[rows, None]))
        # Flipping the upper bit orders signed numbers as unsigned ones are ordered.
        limit = bound[rows, None] if isinstance(bound, Tensor) else bound
        keeps = hashed.bitwise_xor_(-(2**31)) >= limit
        factor = scale[rows, None] if isinstance(scale, Tensor) else scale
        low = x.dtype in (torch.bfloat16, torch.float16)
        values = (x[rows].float() if low else x[rows]) * factor
        out[rows] = torch.where(keeps, values, torch.zeros_like(values))
    return out


def _mixed(x: Tensor) -> Tensor:
    """lowbias32 of int32 numbers, in place."""
    x ^= (x >> 16) & 0xFFFF
    x *= MULTIPLIERS[0]
    x ^= (x >> 15) & 0x1FFFF
    x *= MULTIPLIERS[1]
    x ^= (x >> 15) & 0x1FFFF
    return x


@cache
def _bound_and_scale(p: float) -> tuple[int, float]:
    """Numbers whose hash, as a signed number, is below the first are dropped; the others are scaled by the second."""
    share = torch.tensor(p, dtype=torch.float32).double()
    return int((share * 2**32).round()) - 2**31, float((1 / (1 - share)).float())


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifted to the right without copies of the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def _signed32(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number
