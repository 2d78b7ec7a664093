"""Which kinds of attention layers a model has, and the form in which it expects masks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def windows(config: Any) -> dict[str, int | None]:
    """Kinds of attention layers and their windows in tokens, None for no window; one kind, "", if all are alike."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if "sliding_attention" in kinds and "full_attention" in kinds or kinds == {"sliding_attention"}:
        return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}
    return {"": None if kinds == {"full_attention"} else window}


def windows_of_layers(config: Any) -> list[int | None]:
    """The window of each layer in tokens; None for a layer without one."""
    kinds = windows(config)
    if "" in kinds:
        return [kinds[""]] * config.num_hidden_layers
    return [kinds[kind] for kind in config.layer_types]


def for_model(masks: Mapping[str, Tensor], config: Any, dtype: Any, *, autocasts: bool = False) -> Any:
    """Convert boolean masks, by kind of layer, to the form that the model expects.

    That is a dict if it has several kinds of layers.

    Args:
        masks: by kind of layer; true where a token is seen.
        config: of the model.
        dtype: in which attention is computed.
        autocasts: autocast converts what fused attention is given to `dtype`. It adds numbers to its scores, as eager
            attention does, and would make them from a boolean mask in every layer, and keep them for the backward pass.
    """
    import torch

    converted = dict(masks)
    eager = config._attn_implementation == "eager"
    if eager or (autocasts and config._attn_implementation == "sdpa"):
        hidden = torch.finfo(dtype).min if eager else -math.inf
        converted = {
            kind: torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, hidden)
            for kind, mask in masks.items()
        }
    return converted.get("", converted)
