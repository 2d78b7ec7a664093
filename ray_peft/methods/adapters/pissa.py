"""PiSSA: LoRA that starts from the largest singular vectors (Meng et al. 2024, arXiv:2404.02948)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ray_peft.methods.changed_base import ChangedBase


class PiSSA(ChangedBase):
    """B A starts as the best approximation of W of its rank, and the base as the rest: training starts at W itself."""

    name: Literal["pissa"] = "pissa"
    iterations: int | None = Field(default=None, ge=1)
    """Subspace iterations of a fast approximation, such as 16; None decomposes each weight exactly, which takes
    seconds a layer on large models."""

    @property
    def initial(self) -> str:
        """PEFT's name of the initialisation."""
        return "pissa" if self.iterations is None else f"pissa_niter_{self.iterations}"
