"""HRA: a chain of trained Householder reflections before each layer (Yuan et al. 2024, arXiv:2405.17484)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.adapter import LayerAdapter

if TYPE_CHECKING:
    from torch import nn


class HRA(LayerAdapter):
    """y = W H1 ... Hr x, each H = I - 2 u u^T / |u|^2 with a trained u."""

    name: Literal["hra"] = "hra"
    kind: ClassVar[str] = "HRA"
    rank: int = Field(default=8, ge=2, multiple_of=2)
    """Reflections of a layer; they start in equal pairs, which change nothing."""
    orthogonal: bool = False
    """Make the vectors orthogonal to each other (Gram-Schmidt)."""

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Reflections."""
        return {"r": self.rank, "apply_GS": self.orthogonal}
