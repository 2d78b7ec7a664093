"""SHiRA: a trained part of each weight itself, chosen at random (Bhardwaj et al. 2024, arXiv:2406.13175)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.adapter import LayerAdapter

if TYPE_CHECKING:
    from torch import nn


class SHiRA(LayerAdapter):
    """y = (W + S) x, with S sparse: of high rank, and quick to add to a base and to take away."""

    name: Literal["shira"] = "shira"
    kind: ClassVar[str] = "SHIRA"
    rank: int = Field(default=16, ge=1)
    """S has as many numbers as LoRA of this rank."""
    mask_seed: int = Field(default=0, ge=0)
    """Draws which numbers of a weight are trained; apart from the trial's seed, since the adapter is found by it."""
    lr: float = Field(default=3.0e-4, gt=0)

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Rank and the seed of its places."""
        return {"r": self.rank, "random_seed": self.mask_seed}
