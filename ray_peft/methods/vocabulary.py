"""Gradients of a vocabulary's matrix, accumulated in place: no second gradient of its size is ever in memory.

For every use of a matrix, autograd computes a gradient of its full size and adds it to the one so far. With Gemma's
262,144 words and a tied output layer, that takes more memory than the rest of the model. Here each use adds to
`weight.grad` piece by piece.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ray_peft.reach.shared_weights import output_layer

PIECE = 8192
"""Rows of the vocabulary whose gradient is computed at a time."""
_MARK = "_gradient_added_in_place"


def add_in_place(model: nn.Module) -> None:
    """Accumulate the gradients of `model`'s input embedding and output layer in place.

    The embedding does so by itself from now on. The loss function of an output layer must ask `is_added_in_place`.
    """
    embedding, head = model.get_input_embeddings(), output_layer(model)  # type: ignore[operator]
    if not isinstance(embedding, nn.Embedding) or embedding.max_norm is not None or embedding.scale_grad_by_freq:
        return
    if isinstance(head, nn.Linear):
        setattr(head.weight, _MARK, True)
    setattr(embedding.weight, _MARK, True)
    if "forward" not in vars(embedding):
        forward = embedding.forward
        own: Any = embedding
        own.forward = lambda ids: _Embedded.apply(ids, embedding.weight, embedding, forward)  # type: ignore[no-untyped-call]


def is_added_in_place(weight: Tensor) -> bool:
    """Whether whoever uses a matrix must add to its gradient in place."""
    return getattr(weight, _MARK, False) and weight.requires_grad


def add_rows(weight: Tensor, begin: int, gradient: Tensor) -> None:
    """Add `gradient` (row, column) to the rows of `weight.grad` from `begin` on."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    weight.grad[begin : begin + len(gradient)] += gradient


class _Embedded(Function):
    """The forward pass of an embedding; the backward pass adds to `weight.grad` and returns no gradient."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, module: nn.Embedding, forward: Any) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.module = weight, module
        rows: Tensor = forward(ids)
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (ids,), weight, (grad,) = ctx.saved_tensors, ctx.weight, grads
        ids, rows = ids.reshape(-1), _of_rows(ctx.module, ids, grad)
        padding = ctx.module.padding_idx
        if padding is not None:
            rows = rows.masked_fill((ids == padding)[:, None], 0.0)
        for begin in range(0, len(weight), PIECE):
            count = min(PIECE, len(weight) - begin)
            place = ids - begin
            place = torch.where((place < 0) | (place >= count), count, place)  # others go into a spare row
            piece = torch.ops.aten.embedding_dense_backward(rows, place, count + 1, count, False)
            add_rows(weight, begin, piece[:count])
        return None, None, None, None


def _of_rows(module: nn.Embedding, ids: Tensor, grad: Tensor) -> Tensor:
    """The gradient (token, column) of the row that each token looks up, before the module scales it.

    Some models scale their embedding. The module is linear in its matrix, so a copy of it with a matrix of zeros, one
    row for each token, has the same derivative.
    """
    tokens = ids.numel()
    twin = copy.copy(module)
    twin.padding_idx = None
    table = torch.zeros(tokens, module.embedding_dim, dtype=grad.dtype, device=grad.device, requires_grad=True)
    twin._parameters = {"weight": table}  # type: ignore[dict-item]  # noqa: SLF001 - a copy's own
    with torch.enable_grad():
        rows = type(module).forward(twin, torch.arange(tokens, device=ids.device).view(ids.shape))
    (table_grad,) = torch.autograd.grad(rows, table, grad)
    return table_grad
