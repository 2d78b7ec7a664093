"""RandLoRA: full-rank updates from shared random matrices, scaled (Albert et al. 2025, arXiv:2502.00987)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.adapter import LayerAdapter

if TYPE_CHECKING:
    from torch import nn


class RandLoRA(LayerAdapter):
    """A sum of random low-rank products that all layers share, with trained diagonal factors."""

    name: Literal["randlora"] = "randlora"
    kind: ClassVar[str] = "RANDLORA"
    rank: int = Field(default=32, ge=1)
    """Of each random product; a smaller one has more of them, and trains more numbers."""
    alpha: float = Field(default=640.0, gt=0)
    """Numerator of the scale alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    lr: float = Field(default=1.0e-4, gt=0)

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Rank and scale; the random matrices are saved with it."""
        return {"r": self.rank, "randlora_alpha": self.alpha, "randlora_dropout": self.dropout}
