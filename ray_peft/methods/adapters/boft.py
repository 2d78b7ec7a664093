"""BOFT: orthogonal transforms of layers as products of sparse ones, a butterfly (Liu et al. 2023, arXiv:2311.06243)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.adapter import LayerAdapter

if TYPE_CHECKING:
    from torch import nn


class BOFT(LayerAdapter):
    """OFT with several sparse factors, so that few parameters turn all dimensions; slow, and dense matrices a layer."""

    name: Literal["boft"] = "boft"
    kind: ClassVar[str] = "BOFT"
    block_size: int = Field(default=4, ge=2)
    """Side of a block; it must divide what every target takes."""
    factors: int = Field(default=1, ge=1)
    """Butterfly factors; with more than one, blocks times 2 ** (factors - 1) must divide it, too."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of blocks that rest in a pass."""

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Blocks and factors."""
        return {
            "boft_block_size": self.block_size,
            "boft_n_butterfly_factor": self.factors,
            "boft_dropout": self.dropout,
        }
