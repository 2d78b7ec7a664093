"""QLoRA: LoRA on a base stored in 4 bits (Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from ray_peft.methods.base import Dtype, Quantization, Task
from ray_peft.methods.lora import LowRankAdapter
from ray_peft.methods.merging import merged_plain

if TYPE_CHECKING:
    from torch import nn


class QLoRA(LowRankAdapter):
    """LoRA beside weights kept in NF4 and dequantised for each matrix product."""

    name: Literal["qlora"] = "qlora"
    tasks: ClassVar[frozenset[Task]] = frozenset({"llm_sft", "text_to_image"})
    takes_experts: ClassVar[bool] = True
    says_no_count: ClassVar[bool] = True
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

    def arithmetic(self, dtype: Dtype, four_bit_share: float | None = None, storage: Quantization | None = None) -> str:
        """The storage of the base, the dtype it is computed in, and that of the adapters."""
        return super().arithmetic(dtype, four_bit_share, self.quantization())

    def why_not_sharded(self) -> str | None:
        """The frozen base is spread; every worker holds the adapters whole."""
        return None

    def merge(self, model: nn.Module) -> nn.Module:
        """Add B A to the dequantised base."""
        return merged_plain(model)
