"""MiSS: one trained matrix whose rows many inputs share (Kang and Yin 2024, arXiv:2409.15371)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.adapter import LayerAdapter

if TYPE_CHECKING:
    from torch import nn


class MiSS(LayerAdapter):
    """y = W x + D^T s, where s sums the input's shards: half of LoRA's matrices, and less memory."""

    name: Literal["miss"] = "miss"
    kind: ClassVar[str] = "MISS"
    rank: int = Field(default=32, ge=1)
    """Rows of D; trained numbers of a layer are rank times its outputs."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Rank and dropout."""
        return {"r": self.rank, "miss_dropout": self.dropout}
