"""Adding what an adapter has learnt to the base's weights, which are dequantised first where they are quantised."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


def merged(model: nn.Module) -> nn.Module:
    """The base with the adapter in its weights, and without PEFT's wrapper."""
    return merged_plain(model) if quantised(model) else _merged(model)


def quantised(model: nn.Module) -> bool:
    """Whether weights are stored in 4 or 8 bits."""
    return any(hasattr(parameter, "quant_state") or hasattr(parameter, "SCB") for parameter in model.parameters())


def merged_plain(model: nn.Module) -> nn.Module:
    """Add an adapter to the dequantised base: merging into quantised weights would quantise the update away."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    adapted = cast("PeftModel", model)
    name = adapted.active_adapter
    config = adapted.peft_config[name]
    adapters = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    # transformers 5.23 leaves its marks, for which TRL would round all weights of a later stage to bfloat16, and PEFT
    # would not take (IA)3 out of its layers.
    base: Any = adapted.get_base_model()
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(base, mark):
            setattr(base, mark, False)
    plain: Any = _dequantised(adapted.unload())
    again = get_peft_model(plain, config)
    set_peft_model_state_dict(again, adapters)
    return _merged(again)


def _merged(model: Any) -> nn.Module:
    merged: nn.Module = model.merge_and_unload()
    return merged


def _dequantised(model: nn.Module) -> nn.Module:
    """`model` with plain layers of the kinds that its files hold.

    transformers 5.23 quantises GPT-2's Conv1D layers, and gives back nn.Linear, whose weights lie the other way round:
    such a model saves files that cannot be loaded, or where a weight is square, are loaded wrong.
    """
    from torch import nn as layers
    from transformers.pytorch_utils import Conv1D

    turned = [name for name, module in model.named_modules() if getattr(module, "source_cls", None) is Conv1D]
    plain: nn.Module = model.dequantize()  # type: ignore[operator]
    for name in turned:
        linear = cast("nn.Linear", plain.get_submodule(name))
        layer = Conv1D(linear.out_features, linear.in_features)  # type: ignore[no-untyped-call]
        layer.weight = layers.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False)
        layer.bias = layers.Parameter(linear.bias.detach().to(linear.weight.dtype), requires_grad=False)
        plain.set_submodule(name, layer)
    return plain
