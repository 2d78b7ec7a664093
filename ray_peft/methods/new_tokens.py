"""Rows of new tokens in a model's embeddings, which PEFT trains beside an adapter (`trainable_token_indices`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray_peft.errors import ModelError
from ray_peft.reach.shared_weights import output_layer
from ray_peft.reach.targets import named_by

if TYPE_CHECKING:
    from torch import nn

TRAINED_KINDS = frozenset({"LORA", "ADALORA"})
"""PEFT's kinds of adapters whose config can name rows of embeddings to train (0.21)."""

NOT_RECORDED = "rows of new tokens are trained, which PEFT copies into the embeddings from the host in every pass"
"""Why passes with such an adapter are not recorded."""

_MARK = "new_token_ids"


def mark(model: nn.Module, ids: Sequence[int]) -> None:
    """Note on a base which rows of its embeddings belong to new tokens."""
    if ids:
        setattr(model, _MARK, tuple(ids))


def marked(model: nn.Module) -> tuple[int, ...]:
    """The rows of a base that belong to new tokens; none without such tokens."""
    ids: tuple[int, ...] = getattr(model, _MARK, ())
    return ids


def trains_rows(model: nn.Module) -> bool:
    """Whether an adapter on a model holds rows of its embeddings."""
    layers = [getattr(model, get)() for get in ("get_input_embeddings", "get_output_embeddings") if hasattr(model, get)]
    return any(hasattr(layer, "token_adapter") for layer in layers)


def complete(adapted: Any) -> None:
    """Give the output layer of a model with trained rows its missing bias, for which TRL's head asks (PEFT 0.21)."""
    if trains_rows(adapted):
        head = adapted.get_output_embeddings()
        if hasattr(head, "token_adapter"):
            head.bias = None


def rows_to_train(
    model: Any, layers: Sequence[str], whole: Sequence[str], *, of: str, key: str
) -> dict[str, list[int]] | list[int]:
    """The new tokens' rows as PEFT's config names them: of tied embeddings once, else by layer.

    Args:
        model: marked, on any device.
        layers: whole names of those that get an adapter.
        whole: ends of the names of modules that are trained whole, whose new rows need nothing else.
        of: the model as an error names it.
        key: the method's place in the trial's settings.

    Raises:
        ModelError: PEFT cannot train rows of these layers.
    """
    from torch import nn

    ids, embedding, head = list(marked(model)), model.get_input_embeddings(), output_layer(model)
    names = {id(module): name for name, module in model.named_modules()}
    tied = head is None or head.weight is embedding.weight
    chosen = {names[id(module)]: module for module in ([embedding] if tied else [embedding, head])}
    for name, module in chosen.items():
        if type(module).__name__ != "Embedding" and not isinstance(module, nn.Embedding | nn.Linear):
            raise ModelError(
                f"model.new_tokens: {name} of {of} is a {type(module).__name__}, of which PEFT trains no single rows; "
                "use method full"
            )
        if name in layers:
            raise ModelError(
                f"{key}.targets: {name} of {of} cannot have an adapter while rows of it are trained for "
                "model.new_tokens; leave it out"
            )
    if head is not None and getattr(head, "bias", None) is not None:
        raise ModelError(
            f"model.new_tokens: {names[id(head)]} of {of} has a bias, which PEFT leaves out where it trains rows; use "
            "method full"
        )
    if tied:
        return ids
    return {name: ids for name in chosen if not any(named_by(entry, name) for entry in whole)}
