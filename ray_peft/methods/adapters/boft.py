"""BOFT: orthogonal transforms of layers as products of sparse ones, a butterfly (Liu et al. 2023, arXiv:2311.06243)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ray_peft.errors import SpecError
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
    """Butterfly factors; with more than one, blocks times 2 ** (factors - 1) must divide it, too, and PEFT must be able
    to compile its CUDA kernel: without it PEFT takes one factor, so that it is refused here."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of blocks that rest in a pass."""

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Blocks and factors."""
        return {
            "boft_block_size": self.block_size,
            "boft_n_butterfly_factor": self.factors,
            "boft_dropout": self.dropout,
        }

    def select(self, adapted: nn.Module) -> None:
        """Refuse several factors where PEFT has silently taken one."""
        if self.factors > 1 and any(not getattr(layer, "fbd_cuda_available", True) for layer in adapted.modules()):
            raise SpecError(
                f"method.factors: {self.factors} needs PEFT's CUDA kernel, which cannot be compiled here, and PEFT "
                "would take 1; set factors: 1, or install nvcc and ninja"
            )
