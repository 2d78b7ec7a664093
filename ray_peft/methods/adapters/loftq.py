"""LoftQ: LoRA that starts from what quantising the base took away (Li et al. 2023, arXiv:2310.08659)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ray_peft.methods.adapter import on_shapes
from ray_peft.methods.base import Quantization
from ray_peft.methods.lora import LowRankAdapter

if TYPE_CHECKING:
    from torch import nn


class LoftQ(LowRankAdapter):
    """B A starts as the best approximation of W less its 4-bit copy: one round, which leaves that copy as it is.

    Further rounds of the paper's would quantise the base anew, so that the saved adapter would belong to another base.
    """

    name: Literal["loftq"] = "loftq"
    iterations: int | None = Field(default=16, ge=1)
    """Subspace iterations of a fast approximation; None decomposes what was lost of each weight exactly."""

    def why_not_plain(self) -> str | None:
        """On a plain base nothing was lost."""
        return (
            f"method {self.name} starts from what 4 bits take away, and model.quantization is null; set it to nf4, or "
            "use method lora"
        )

    def why_not_on(self, storage: Quantization) -> str | None:
        """Its start is computed for 4 bits."""
        if storage.bits == 4:
            return super().why_not_on(storage)
        return (
            f"method {self.name} starts from what 4 bits take away, not {storage.quant_type}; use nf4, or method lora"
        )

    def attach(self, model: nn.Module) -> nn.Module:
        """LoRA, started from the weights in the model's files.

        Raises:
            SpecError: they are in no safetensors file.
        """
        from ray_peft.methods.lost_weights import start_from_loss

        adapted = super().attach(model)
        if not on_shapes(adapted):
            start_from_loss(adapted, self.iterations)
        return adapted
