"""rsLoRA: LoRA scaled by the root of its rank, so that high ranks learn (Kalajdzievski 2023, arXiv:2312.03732)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.lora import LowRankAdapter

if TYPE_CHECKING:
    from torch import nn


class RsLoRA(LowRankAdapter):
    """y = W x + (alpha / sqrt(rank)) B A x."""

    name: Literal["rslora"] = "rslora"
    takes_experts: ClassVar[bool] = True
    alpha: float = Field(default=8.0, gt=0)
    """Numerator of the scale alpha / sqrt(rank); at rank 16 the default is LoRA's scale."""

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """LoRA's, with the other scale."""
        return {**super().config_fields(model), "use_rslora": True}
