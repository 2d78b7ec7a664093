"""QLoRA: LoRA on a base stored in 4 bits (Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from ray_peft.methods.base import Dtype, Quantization, Task
from ray_peft.methods.lora import LowRankAdapter

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn


class QLoRA(LowRankAdapter):
    """LoRA beside weights kept in NF4 and dequantised for each matrix product."""

    name: Literal["qlora"] = "qlora"
    tasks: ClassVar[frozenset[Task]] = frozenset({"llm_sft", "text_to_image"})
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    """Quantise the quantisation constants too: about 0.37 bits a parameter less."""
    compute_dtype: Dtype = "bfloat16"
    """The dtype into which weights are dequantised for each matrix product."""

    def quantization(self) -> Quantization:
        """The 4-bit storage of the base."""
        return Quantization(
            quant_type=self.quant_type, double_quant=self.double_quant, compute_dtype=self.compute_dtype
        )

    def arithmetic(self, dtype: Dtype, four_bit_share: float | None = None) -> str:
        """The storage of the base, the dtype it is computed in, and that of the adapters."""
        base = f"frozen {self.quant_type} base computed in {self.compute_dtype}"
        if four_bit_share is not None:
            base = (
                f"frozen base, {four_bit_share:.0%} of its weights in {self.quant_type} computed in "
                f"{self.compute_dtype}, the others in {dtype}"
            )
        return f"{base}, {self.adapter_dtype} adapters"

    def merge(self, model: nn.Module) -> nn.Module:
        """Add B A to the dequantised base: merging into 4-bit weights would quantise the update away."""
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        adapted = cast("PeftModel", model)
        name = adapted.active_adapter
        config = adapted.peft_config[name]
        adapters = get_peft_model_state_dict(adapted, adapter_name=name)
        plain: Any = _dequantised(adapted.unload())
        # transformers 5.23 leaves its mark, for which TRL would round all weights of a later stage to bfloat16.
        if hasattr(plain, "is_loaded_in_4bit"):
            plain.is_loaded_in_4bit = False
        again = get_peft_model(plain, config)
        set_peft_model_state_dict(again, adapters)
        merged: nn.Module = again.merge_and_unload()
        return merged


def _dequantised(model: nn.Module) -> nn.Module:
    """`model` with plain layers of the kinds that its files hold.

    transformers 5.23 stores GPT-2's Conv1D layers in 4 bits, and gives back nn.Linear, whose weights lie the other way
    round: such a model saves files that cannot be loaded, or where a weight is square, are loaded wrong.
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
