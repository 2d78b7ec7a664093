"""Attention with keyed dropout of its probabilities: plain products, recomputed in the backward pass.

A fused kernel draws its dropout by the position in the pass, so it cannot give a row the same mask in another pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ray_peft.engine.keyed_dropout import keyed_dropout


def dropped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *,
    p: float, is_causal: bool, scale: float | None, keys: Tensor, columns: Tensor | None, layer: int,
) -> Tensor:  # fmt: skip
    """softmax(query key^T scale + mask), dropped, times value: what torch's scaled_dot_product_attention computes.

    Args:
        query: (lane, head, token, width).
        key: (lane, head, token, width); fewer heads serve as many query heads each.
        value: as `key`.
        mask: boolean (True is seen) or added to the scores, broadcast to them; None with `is_causal`, or for none.
        p: share of the probabilities that are dropped.
        is_causal: tokens see themselves and earlier ones.
        scale: of the scores; None is one over the root of the width.
        keys: as `keyed_dropout` takes them for the probabilities (lane, head, token, token).
        columns: likewise.
        layer: likewise.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        query, key, value = query.to(low), key.to(low), value.to(low)
    if key.shape[1] != query.shape[1]:
        heads = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(heads, 1), value.repeat_interleave(heads, 1)
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    out: Tensor = _Attention.apply(query, key, value, mask, scale, p, keys, columns, layer)  # type: ignore[no-untyped-call]
    return out


class _Attention(Function):
    """Stores only its inputs for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, p: float, keys: Tensor,
        columns: Tensor | None, layer: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(query, key, value, mask, keys, columns)
        ctx.scale, ctx.p, ctx.layer = scale, p, layer
        shares = _probabilities(query, key, mask, scale)
        return torch.matmul(keyed_dropout(shares.to(value.dtype), p, keys, layer, columns), value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, mask, keys, columns = ctx.saved_tensors
        (grad,) = grads
        shares = _probabilities(query, key, mask, ctx.scale)
        dropped = keyed_dropout(shares.to(value.dtype), ctx.p, keys, ctx.layer, columns)
        of_value = torch.matmul(dropped.transpose(-1, -2), grad)
        del dropped
        # A gradient is dropped where its number was dropped.
        of_shares = keyed_dropout(torch.matmul(grad, value.transpose(-1, -2)), ctx.p, keys, ctx.layer, columns)
        of_shares = of_shares.to(shares.dtype) * shares
        of_scores = of_shares.sub_(shares.mul_(of_shares.sum(-1, keepdim=True))).mul_(ctx.scale).to(query.dtype)
        del shares, of_shares
        of_query, of_key = torch.matmul(of_scores, key), torch.matmul(of_scores.transpose(-1, -2), query)
        return of_query, of_key, of_value, *([None] * 6)


def _probabilities(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention probabilities (lane, head, token, token), float32 or float64; each row sums to one."""
    scores = torch.matmul(query, key.transpose(-1, -2))
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores.add_(mask)
    return torch.softmax(scores, -1)
