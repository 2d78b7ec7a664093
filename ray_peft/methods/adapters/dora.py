"""DoRA: LoRA for the direction of each weight column, and a trained magnitude (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ray_peft.methods.base import Quantization
from ray_peft.methods.lora import LowRankAdapter

if TYPE_CHECKING:
    from torch import nn


class DoRA(LowRankAdapter):
    """y = m * (W x + (alpha / rank) B A x) / |W + (alpha / rank) B A|, with the norm of each output and a trained m."""

    name: Literal["dora"] = "dora"

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """LoRA's, with the magnitude."""
        return {**super().config_fields(model), "use_dora": True}

    def why_not_on(self, storage: Quantization) -> str | None:
        """PEFT 0.21 reads scales of int8 layers that bitsandbytes 0.50 has moved by then."""
        if storage.bits == 4:
            return super().why_not_on(storage)
        return (
            "method dora cannot be trained on a base in int8: PEFT looks for the scales of its layers in another place "
            "than bitsandbytes keeps them; use model.quantization: nf4, or method lora"
        )
