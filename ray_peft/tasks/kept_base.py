"""The base of the trial before, kept on its device for the next trial that starts from the same weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptBase:
    """A base that no trial has touched: trials get copies of its modules, which share its weights."""

    key: str
    """What the weights depend on: content of the model, dtype, storage and device."""
    model: PreTrainedModel
    sums: list[int]
    """Of the bits of each weight as it was loaded."""


_bases: list[KeptBase] = []
"""One at most: a second base would take memory that a trial may need."""


def keep(key: str, model: PreTrainedModel) -> PreTrainedModel:
    """Keep a base as it was loaded; returns a model to train, which shares its weights and nothing else.

    A model whose modules were changed after they were built is not kept, and comes back itself.

    Args:
        key: what the weights depend on.
        model: without gradients, and before anything is attached to it.
    """
    drop()
    if any("forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules()):
        return model
    _bases.append(KeptBase(key, model, _sums(model)))
    return _shared_copy(model)


def take(key: str) -> PreTrainedModel | None:
    """A model that shares the kept weights; None if others are kept, or they are no longer what was loaded."""
    if not _bases or _bases[0].key != key:
        return None
    model, sums = _bases[0].model, _bases[0].sums
    if any(parameter.requires_grad for parameter in model.parameters()) or _sums(model) != sums:
        logger.warning("the weights of the base that was kept have changed, so it is loaded again")
        drop()
        return None
    return _shared_copy(model)


def drop(unless: str | None = None) -> None:
    """Give the kept base back, unless it is that of this key."""
    if _bases and _bases[0].key != unless:
        _bases.clear()


def _shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The model with modules of its own over the same tensors."""
    memo: dict[int, Any] = {id(shared): shared for shared in _shared(model)}
    return copy.deepcopy(model, memo)


def _shared(model: PreTrainedModel) -> Iterator[Any]:
    """Parameters, buffers, and what describes the numbers of 4-bit weights."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            yield state


def _sums(model: PreTrainedModel) -> list[int]:
    """Of the bits of each parameter, buffer and constant of quantisation, as whole numbers modulo 2**64."""
    import torch

    sums = [_sum(tensor) for tensor in _tensors(model)]
    return [int(number) for number in torch.stack(sums).tolist()] if sums else []


def _tensors(model: PreTrainedModel) -> Iterator[Tensor]:
    import torch

    for shared in _shared(model):
        state = None if isinstance(shared, torch.Tensor) else shared
        if state is None:
            yield shared
        while state is not None:
            yield from (value for value in vars(state).values() if isinstance(value, torch.Tensor))
            state = getattr(state, "state2", None)


def _sum(tensor: Tensor) -> Tensor:
    """Of a tensor's bits."""
    import torch

    content = tensor.detach().contiguous().flatten().view(torch.uint8)
    whole = content.numel() // 8 * 8 if content.storage_offset() % 8 == 0 else 0
    return content[:whole].view(torch.int64).sum() + content[whole:].sum(dtype=torch.int64)
