"""OFT: turns what each layer takes by trained rotations of blocks (Qiu et al. 2023, arXiv:2306.07280)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.adapter import LayerAdapter

if TYPE_CHECKING:
    from torch import nn


class OFT(LayerAdapter):
    """y = W R x, with R block-diagonal and orthogonal by Cayley's transform; angles between weights stay."""

    name: Literal["oft"] = "oft"
    kind: ClassVar[str] = "OFT"
    block_size: int = Field(default=32, ge=2)
    """Side of a block; PEFT takes the nearest that divides a layer's input."""
    cayley_terms: int | None = Field(default=5, ge=1)
    """Terms of a series for the inverse in Cayley's transform; None solves it exactly, which is slower."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of blocks that rest in a pass."""

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Blocks, and how they are made orthogonal."""
        terms = {} if self.cayley_terms is None else {"num_cayley_neumann_terms": self.cayley_terms}
        exact = {"use_cayley_neumann": self.cayley_terms is not None}
        return {"oft_block_size": self.block_size, "module_dropout": self.dropout, **exact, **terms}
