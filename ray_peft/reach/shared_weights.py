"""Layers whose weights are used elsewhere, too: an adapter beside one of them is not what it seems."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ray_peft.errors import ModelError

if TYPE_CHECKING:
    from torch import nn


def refuse_head_and_tied(model: nn.Module, layers: Iterable[str], *, of: str, key: str) -> None:
    """Refuse adapters beside a language model's output layer, and beside embeddings that share its weights.

    Training and scoring multiply hidden states with the output layer's plain weight in tiles, so that an adapter there
    is never asked (TRL 1.16 refuses it, too). A merge adds an adapter to the one weight that both sides share, and
    changes the side that was not trained: a held-out loss of 5.24 became 38.44.

    Args:
        model: on any device.
        layers: whole names of those that get an adapter.
        of: the model as an error names it.
        key: the setting as an error names it.

    Raises:
        ModelError: one of them is such a layer.
    """
    names = list(layers)
    head = output_layer(model)
    heads = [name for name in names if head is not None and model.get_submodule(name) is head]
    if heads:
        raise ModelError(
            f"{key}: {heads[0]} is the output layer of {of}; the loss is computed from its plain weight, so an adapter "
            f"there would never be trained; leave it out, or train all weights with method full or galore"
        )
    tied = [name for name in names if name in tied_layers(model)]
    if tied:
        raise ModelError(
            f"{key}: {tied[0]} of {of} shares its weight with {tied_layers(model)[tied[0]]} (tied embeddings), so that "
            "merging an adapter there would change both; leave it out, or train all weights with method full or galore"
        )


def output_layer(model: nn.Module) -> nn.Module | None:
    """A language model's output layer; None for models of another kind."""
    get = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = get() if get is not None else None
    return head


def tied_layers(model: nn.Module) -> dict[str, str]:
    """Layers that share their weight with another one, and that one; from what transformers ties by the config."""
    pairs: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    tied = {name.removesuffix(".weight"): partner.removesuffix(".weight") for name, partner in pairs.items()}
    return {partner: name for name, partner in tied.items()} | tied
