"""Gradients of a vocabulary's matrix, added up in place: that of an embedding is never whole beside the one kept.

Autograd makes a gradient of the size of the matrix for each use of it, and adds it to the one that is there: with
Gemma's 262,144 words and a tied output layer that is more than the rest of the model. Here each use adds a piece of
the vocabulary at a time to `weight.grad`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ray_peft.reach.shared_weights import output_layer

PIECE = 8192
"""Words whose gradient is computed at a time."""
_MARK = "_gradient_added_in_place"


def add_in_place(model: nn.Module) -> None:
    """Let the matrices of `model`'s input embedding and output layer add up their gradients in place.

    The embedding does so by itself from now on; an output layer's loss function asks `is_added_in_place`.
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
    """Whether a matrix's gradient is added up in place, so that its user has to do so."""
    return getattr(weight, _MARK, False) and weight.requires_grad


def add_rows(weight: Tensor, begin: int, gradient: Tensor) -> None:
    """Add the gradient of the rows from `begin` on, (row, column)."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    weight.grad[begin : begin + len(gradient)] += gradient


class _Embedded(Function):
    """An embedding's forward pass, whose backward pass adds to `weight.grad` and hands no gradient on."""

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
            place = torch.where((place < 0) | (place >= count), count, place)  # all others into one row more
            piece = torch.ops.aten.embedding_dense_backward(rows, place, count + 1, count, False)
            add_rows(weight, begin, piece[:count])
        return None, None, None, None


def _of_rows(module: nn.Embedding, ids: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the row of each token (token, column), through what the module does to its rows.

    A model's embedding may scale them: the module is linear in its matrix, so one of zeros, with a row for each token,
    has the same derivative.
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
