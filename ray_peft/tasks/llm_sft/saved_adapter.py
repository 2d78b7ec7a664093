"""Writing an adapter as PEFT reads it, for the base as its files hold it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.methods.base import Dtype
from ray_peft.methods.changed_base import as_plain_lora
from ray_peft.methods.new_tokens import trains_rows
from ray_peft.tasks.parameters import stored

if TYPE_CHECKING:
    from torch import Tensor

_INSIDE = "base_model.model."
"""What PEFT puts before the names of the base's own modules; what all layers of an adapter share lies outside."""
_BESIDE = re.compile(r"\.(modules_to_save|trainable_tokens_delta)\.")
"""What is trained beside an adapter: whole modules, and rows of embeddings."""


def save_adapter(model: Any, folder: Path, dtype: Dtype) -> None:
    """Write what an adapter has trained, and what is frozen in it, in `dtype`; the model keeps its own.

    Adapters that took their start out of the base are written as plain LoRA.

    Raises:
        TrialFailed: a weight is beyond the range of `dtype`.
    """
    if model.active_peft_config.is_prompt_learning:
        model.save_pretrained(str(folder), safe_serialization=True)
        _convert(folder / "adapter_model.safetensors", dtype)
        return
    plain = as_plain_lora(model)
    tensors = _own(model) if plain is None else {**_own(model), **plain[0]}
    state = {name: stored(name, tensor, dtype) for name, tensor in tensors.items()}
    ranks = getattr(model.active_peft_config, "rank_pattern", None)
    # PEFT would save the whole embeddings of a base that has grown; its new rows are part of the adapter.
    embeddings: Any = False if trains_rows(model) else "auto"
    model.save_pretrained(str(folder), state_dict=state, safe_serialization=True, save_embedding_layers=embeddings)
    if ranks:  # PEFT 0.21 renames those of AdaLoRA, which would find its ranks no more if it trained on
        model.active_peft_config.rank_pattern = ranks
    if plain is not None:
        plain[1].inference_mode = True
        plain[1].save_pretrained(str(folder))


def _own(model: Any) -> dict[str, Tensor]:
    """The tensors that are the adapter's, or that are trained beside it, by name."""
    prefix = str(model.base_model.prefix)  # PEFT's word in the names of what an adapter adds
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if prefix in name or name in trained or not name.startswith(_INSIDE) or _BESIDE.search(name)
    }


def _convert(file: Path, dtype: Dtype) -> None:
    """Write a file of weights again in `dtype`."""
    from safetensors.torch import load_file, save_file

    weights = {name: stored(name, tensor, dtype) for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
