"""AdamW on bfloat16 weights in one kernel a tensor, rounded stochastically, where Triton is: NVIDIA GPUs under Linux.

The same arithmetic in torch, operation by operation, reads and writes some fifteen times as many bytes. The random bits
are those of a counter: they depend on a seed and on a number's place in its tensor.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_THERE = importlib.util.find_spec("triton") is not None
_BLOCK = 1024

if _THERE:
    import triton
    import triton.language as tl


def serves(weight: Tensor) -> bool:
    """Whether the kernel can update a weight, and computes what torch does on its GPU."""
    return _THERE and weight.is_cuda and weight.is_contiguous() and _works(weight.device)


@cache
def _works(device: torch.device) -> bool:
    """Compare the kernel with torch on a few numbers: a driver or compiler that does not suit it costs only speed."""
    weight, grad, first, second = (torch.linspace(start, 2.0, 100, device=device) for start in (-2.0, -1.0, 0.5, 0.1))
    mean, square = first * 0.9 + grad * 0.1, second * 0.99 + grad * grad * 0.01
    expected = (weight - 0.01 * mean / (square.sqrt() + 1e-6)) * (1 - 0.001)
    try:
        adamw(weight, grad, [first, second], betas=(0.9, 0.99), eps=1e-6, size=0.01, decay=0.001, seed=2**61)
        right = torch.allclose(weight, expected, atol=1e-5) and torch.allclose(second, square, atol=1e-5)
        reason = "it computes other numbers"
    except Exception as error:  # of Triton, its compiler or the driver
        right, reason = False, f"{type(error).__name__}: {error}"
    if not right:
        logger.warning("weights are updated by torch's own operations, which is slower; the kernel: %s", reason)
    return right


def to_direction(grad: Tensor, moments: list[Tensor], *, betas: tuple[float, float], eps: float, seed: int) -> None:
    """Update the moments with a gradient, and turn that into their quotient, in its dtype.

    Args:
        grad: contiguous; overwritten.
        moments: first and second, contiguous, of as many numbers; what is bfloat16 is rounded stochastically.
        betas: their decay rates.
        eps: added to the root of the second moment.
        seed: of the random bits.
    """
    _launch(grad, grad, moments[0], moments[1], betas, eps, 0.0, 0.0, seed, has_moments=True, moves=False)


def move(weight: Tensor, direction: Tensor, *, size: float, decay: float, seed: int) -> None:
    """Take `size` times a direction from a weight, then `decay` times the weight itself; both contiguous."""
    _launch(weight, direction, weight, weight, (0.0, 0.0), 0.0, size, decay, seed, has_moments=False, moves=True)


def adamw(
    weight: Tensor,
    grad: Tensor,
    moments: list[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
    size: float,
    decay: float,
    seed: int,
) -> None:
    """Both at once: `to_direction` without its overwriting, then `move`."""
    _launch(weight, grad, moments[0], moments[1], betas, eps, size, decay, seed, has_moments=True, moves=True)


def _launch(
    weight: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    betas: tuple[float, float],
    eps: float,
    size: float,
    decay: float,
    seed: int,
    *,
    has_moments: bool,
    moves: bool,
) -> None:
    count = grad.numel()
    kernel: Any = _kernel
    kernel[(-(-count // _BLOCK),)](
        weight, grad, first, second, count, betas[0], betas[1], eps, size, decay, seed,
        HAS_MOMENTS=has_moments, MOVES=moves, BLOCK=_BLOCK,
    )  # fmt: skip


if _THERE:

    @triton.jit  # type: ignore[untyped-decorator]
    def _rounded(values, bits, kind: tl.constexpr):  # type: ignore[no-untyped-def]
        """As methods/stochastic.py: a bfloat16 is the upper half of a float32, rounded up with a chance of the rest."""
        if kind == tl.bfloat16:
            whole = values.to(tl.int32, bitcast=True) + (bits & 0xFFFF).to(tl.int32)
            values = (whole & -65536).to(tl.float32, bitcast=True)
        return values.to(kind)

    @triton.jit(do_not_specialize=["count", "seed", "beta1", "beta2", "eps", "size", "decay"])  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        weight,
        grad,
        first,
        second,
        count,
        beta1,
        beta2,
        eps,
        size,
        decay,
        seed,
        HAS_MOMENTS: tl.constexpr,  # noqa: N803 - Triton's own style
        MOVES: tl.constexpr,  # noqa: N803
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = place < count
        direction = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        of_weight, of_first, of_second, _ = tl.randint4x(seed, place)
        if HAS_MOMENTS:
            mean = tl.load(first + place, mask=inside, other=0.0).to(tl.float32)
            square = tl.load(second + place, mask=inside, other=0.0).to(tl.float32)
            mean = mean * beta1 + direction * (1 - beta1)
            square = square * beta2 + direction * direction * (1 - beta2)
            direction = mean / (tl.sqrt(square) + eps)
            tl.store(first + place, _rounded(mean, of_first, first.dtype.element_ty), mask=inside)
            tl.store(second + place, _rounded(square, of_second, second.dtype.element_ty), mask=inside)
        if MOVES:
            moved = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32) - size * direction
            moved = moved - decay * moved
            tl.store(weight + place, _rounded(moved, of_weight, weight.dtype.element_ty), mask=inside)
        else:
            tl.store(grad + place, direction.to(grad.dtype.element_ty), mask=inside)
