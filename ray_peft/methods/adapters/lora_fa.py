"""LoRA-FA: LoRA with an A that stays as it was drawn, to keep fewer inputs (Zhang et al. 2023, arXiv:2308.03303)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from ray_peft.methods.lora import LowRankAdapter

if TYPE_CHECKING:
    from torch import nn


class LoRAFA(LowRankAdapter):
    """LoRA of which B alone is trained."""

    name: Literal["lora_fa"] = "lora_fa"
    takes_experts: ClassVar[bool] = True

    def select(self, adapted: nn.Module) -> None:
        """Freeze every A."""
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
