"""GraLoRA: LoRA in blocks of each weight, for finer updates (Jung et al. 2025, arXiv:2505.20355)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.adapter import LayerAdapter

if TYPE_CHECKING:
    from torch import nn


class GraLoRA(LayerAdapter):
    """Each weight in blocks x blocks parts, each with its own LoRA of rank / blocks."""

    name: Literal["gralora"] = "gralora"
    kind: ClassVar[str] = "GRALORA"
    rank: int = Field(default=16, ge=1)
    """As many numbers as LoRA of this rank; a multiple of `blocks`."""
    alpha: float = Field(default=32.0, gt=0)
    """Numerator of the scale alpha / rank."""
    blocks: int = Field(default=2, ge=1)
    """Parts of each side; it must divide what every target takes and gives."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Rank, scale and blocks."""
        return {"r": self.rank, "alpha": self.alpha, "gralora_k": self.blocks, "gralora_dropout": self.dropout}
