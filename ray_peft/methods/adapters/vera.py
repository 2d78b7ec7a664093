"""VeRA: frozen random matrices that all layers share, and trained vectors (Kopiczko et al. 2023, arXiv:2310.11454)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.adapter import LayerAdapter

if TYPE_CHECKING:
    from torch import nn


class VeRA(LayerAdapter):
    """y = W x + b * (B (d * (A x))), with A and B random, frozen and shared; d and b are vectors of each layer."""

    name: Literal["vera"] = "vera"
    kind: ClassVar[str] = "VERA"
    rank: int = Field(default=256, ge=1)
    """Rows of A, and numbers of d."""
    d_initial: float = Field(default=0.1, gt=0)
    """What every number of d starts as."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    lr: float = Field(default=4.0e-3, gt=0)

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Its rank and start; the random matrices are saved with it."""
        return {"r": self.rank, "d_initial": self.d_initial, "vera_dropout": self.dropout}
