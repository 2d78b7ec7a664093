"""Which kinds of attention layers a model has, and the form in which it takes masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def windows(config: Any) -> dict[str, int | None]:
    """Kinds of attention layers, and on how many tokens each looks back; one kind, "", where the model has one mask."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in kinds and "full_attention" in kinds or kinds == {"sliding_attention"}:
        return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}
    return {"": None if kinds == {"full_attention"} else window}


def windows_of_layers(config: Any) -> list[int | None]:
    """On how many tokens each layer looks back; None for everything."""
    kinds = windows(config)
    if "" in kinds:
        return [kinds[""]] * config.num_hidden_layers
    return [kinds[kind] for kind in config.layer_types]


def for_model(masks: Mapping[str, Tensor], config: Any, dtype: Any) -> Any:
    """Boolean masks by kind of layer in the form that the model takes.

    By kind where it has several; as numbers of `dtype` that are added to the scores where attention is eager.
    """
    import torch

    converted = dict(masks)
    if config._attn_implementation == "eager":
        least = torch.finfo(dtype).min
        converted = {
            kind: torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, least)
            for kind, mask in masks.items()
        }
    return converted.get("", converted)
