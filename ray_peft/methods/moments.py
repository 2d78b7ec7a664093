"""How AdamW's two moments are stored: in a given dtype, or as 8-bit numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

NAMES = ("exp_avg", "exp_avg_sq")
BLOCK = 256
"""How many 8-bit numbers share a scale; a piece begins at a multiple of it."""
_SMALL = 4096
"""Moments with fewer numbers are stored in float32, as in bitsandbytes."""


@dataclass(frozen=True)
class Piece:
    """A contiguous part of the moments of one weight."""

    state: dict[str, Any]
    """The optimizer's, of the weight."""
    begin: int
    end: int


def make(state: dict[str, Any], like: Tensor, *, eight_bit: bool) -> None:
    """Add moments of zeros to a weight's state.

    Args:
        state: the optimizer's, of the weight.
        like: a tensor with the shape and device of the moments and, unless they are in 8 bits, their dtype.
        eight_bit: store an 8-bit code for each number, and a float32 scale for every 256 (Dettmers et al. 2022,
            arXiv:2110.02861).
    """
    for name in NAMES:
        if not eight_bit:
            state[name] = torch.zeros_like(like, memory_format=torch.contiguous_format)
        elif like.numel() < _SMALL:
            state[name] = torch.zeros_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)
        else:
            state[name] = torch.zeros_like(like, dtype=torch.uint8, memory_format=torch.contiguous_format)
            state[_scales(name)] = like.new_zeros(-(-like.numel() // BLOCK), dtype=torch.float32)


def read(pieces: Sequence[Piece], dtype: torch.dtype) -> list[Tensor]:
    """Copies of both moments of all pieces, one after the other, (number,) each in `dtype`."""
    copies = []
    for name in NAMES:
        parts = [_read(piece, name) for piece in pieces]
        fresh = len(parts) > 1 or _scales(name) in pieces[0].state
        copies.append((torch.cat(parts) if len(parts) > 1 else parts[0]).to(dtype, copy=not fresh))
    return copies


def in_place(piece: Piece) -> list[Tensor] | None:
    """Both moments of a piece as they are stored, (number,) each; None in 8 bits."""
    if _scales(NAMES[0]) in piece.state:
        return None
    return [piece.state[name].view(-1)[piece.begin : piece.end] for name in NAMES]


def write(pieces: Sequence[Piece], values: Sequence[Tensor], stored: Callable[[Tensor, torch.dtype], Tensor]) -> None:
    """Store both moments, (number,) each, back into the pieces.

    Args:
        pieces: those that were read.
        values: first and second moments; they may be overwritten.
        stored: converts float32 numbers to a dtype.
    """
    sizes = [piece.end - piece.begin for piece in pieces]
    for name, moment in zip(NAMES, values, strict=True):
        moments = [piece.state[name].view(-1)[piece.begin : piece.end] for piece in pieces]
        if _scales(name) not in pieces[0].state:
            torch._foreach_copy_(moments, list(torch.split(stored(moment, moments[0].dtype), sizes)))
            continue
        for piece, target, part in zip(pieces, moments, torch.split(moment, sizes), strict=True):
            codes, scales = _ops().quantize_blockwise(part, _code(name, part.device), BLOCK)
            target.copy_(codes)
            _scales_of(piece, name).copy_(scales)


def _read(piece: Piece, name: str) -> Tensor:
    part: Tensor = piece.state[name].view(-1)[piece.begin : piece.end]
    if _scales(name) not in piece.state:
        return part
    numbers: Tensor = _ops().dequantize_blockwise(
        part, _scales_of(piece, name), _code(name, part.device), BLOCK, torch.float32
    )
    return numbers


def _scales(name: str) -> str:
    return f"{name}_scales"


def _scales_of(piece: Piece, name: str) -> Tensor:
    scales: Tensor = piece.state[_scales(name)][piece.begin // BLOCK : -(-piece.end // BLOCK)]
    return scales


@cache
def _ops() -> Any:
    import bitsandbytes  # noqa: F401 - registers them

    return torch.ops.bitsandbytes


@cache
def _code(name: str, device: torch.device) -> Tensor:
    """The numbers (256,) that the codes stand for: bitsandbytes' dynamic map, unsigned for second moments."""
    from bitsandbytes.functional import create_dynamic_map

    if device.type == "meta":
        return torch.empty(256, device=device)
    code: Tensor = create_dynamic_map(signed=name == NAMES[0])  # type: ignore[no-untyped-call]
    return code.to(device)
