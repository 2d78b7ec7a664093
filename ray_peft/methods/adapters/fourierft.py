"""FourierFT: a few trained frequencies of each update (Gao et al. 2024, arXiv:2405.03003)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.adapter import LayerAdapter

if TYPE_CHECKING:
    from torch import nn


class FourierFT(LayerAdapter):
    """W + scaling times the inverse Fourier transform of a spectrum that is zero but for random places."""

    name: Literal["fourierft"] = "fourierft"
    kind: ClassVar[str] = "FOURIERFT"
    frequencies: int = Field(default=1000, ge=1)
    """Trained numbers of each layer."""
    scaling: float = Field(default=300.0, gt=0)
    """Factor of the update; the paper's for instructions."""
    places_seed: int = Field(default=777, ge=0)
    """Draws the places of the frequencies; apart from the trial's seed, since the adapter is found by it."""
    lr: float = Field(default=3.0e-3, gt=0)

    def config_fields(self, model: nn.Module) -> dict[str, Any]:
        """Frequencies and scale."""
        return {"n_frequency": self.frequencies, "scaling": self.scaling, "random_loc_seed": self.places_seed}
