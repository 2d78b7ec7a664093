"""HiRA: a low-rank factor of each weight, so that updates have high rank (Huang et al. 2025, ICLR)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.adapter import LayerAdapter

if TYPE_CHECKING:
    from torch import nn


class HiRA(LayerAdapter):
    """y = W x + (W * (B A)) x, number by number."""

    name: Literal["hira"] = "hira"
    kind: ClassVar[str] = "HIRA"
    rank: int = Field(default=16, ge=1)
    """Inner dimension of B A."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    rank_pattern: dict[str, int] = {}
    """Other ranks for some layers, by the end of a layer's name or a regular expression."""

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Rank and dropout."""
        return {"r": self.rank, "hira_dropout": self.dropout, "rank_pattern": dict(self.rank_pattern)}
