"""PiSSA: LoRA that starts from the largest singular vectors (Meng et al. 2024, arXiv:2404.02948)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ray_peft.methods.changed_base import ChangedBase


class PiSSA(ChangedBase):
    """B A starts as the best approximation of W of its rank, and the base as the rest: training starts at W itself."""

    name: Literal["pissa"] = "pissa"
    iterations: int | None = Field(default=16, ge=1)
    """Subspace iterations of a fast approximation; None decomposes each weight exactly. For SmolLM2-135M that took 29 s
    on an H200, and it grows with the cube of a layer's width."""

    @property
    def initial(self) -> str:
        """PEFT's name of the initialisation."""
        return "pissa" if self.iterations is None else f"pissa_niter_{self.iterations}"
