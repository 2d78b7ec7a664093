"""The trained weights, written in the forms that diffusers and PEFT read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.methods.base import Dtype
from ray_peft.tasks.parameters import stored

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel
    from peft import PeftModel
    from torch import nn

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""An adapter in the form that `StableDiffusionPipeline.load_lora_weights` reads."""


def save(model: nn.Module, folder: Path, dtype: Dtype) -> None:
    """Write the adapter twice, for diffusers and for PEFT, or the UNet below `unet/`; the model itself stays as it is.

    Raises:
        TrialFailed: a weight is beyond the range of `dtype`.
    """
    if hasattr(model, "peft_config"):
        _save_adapter(model, folder, dtype)  # type: ignore[arg-type]
    else:
        converted(model, dtype).save_pretrained(str(folder / "unet"), safe_serialization=True)


def _save_adapter(model: PeftModel, folder: Path, dtype: Dtype) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    prefix = str(model.base_model.prefix)
    named = {name: parameter for name, parameter in model.named_parameters() if prefix in name}
    state = _cast(named, dtype)
    model.save_pretrained(str(folder), state_dict=state, safe_serialization=True)
    layers = get_peft_model_state_dict(model, state_dict=state)
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in layers.items()}
    StableDiffusionPipeline.save_lora_weights(
        str(folder),
        unet_lora_layers=convert_state_dict_to_diffusers(plain),
        unet_lora_adapter_metadata=_metadata(model),
        safe_serialization=True,
    )


def _metadata(model: PeftModel) -> dict[str, Any]:
    """The adapter's settings as diffusers keeps them, without which it would guess alpha from the rank."""
    config = model.peft_config[model.active_adapter].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def converted(unet: Any, dtype: Dtype) -> UNet2DConditionModel:
    """A copy of the UNet on the CPU in `dtype`.

    Raises:
        TrialFailed: a weight is beyond the range of `dtype`.
    """
    import torch

    with torch.device("meta"):
        copy = type(unet).from_config(unet.config)
    copy.load_state_dict(_cast(unet.state_dict(), dtype), assign=True)
    return copy


def _cast(state: dict[str, Any], dtype: Dtype) -> dict[str, torch.Tensor]:
    return {name: stored(name, weight, dtype).cpu().contiguous() for name, weight in state.items()}


def adapter_bytes(folder: Path) -> int:
    """Bytes of the weights, the adapter counted once."""
    adapter = folder / DIFFUSERS_FILE
    return sum(file.stat().st_size for file in ([adapter] if adapter.is_file() else folder.rglob("*.safetensors")))
