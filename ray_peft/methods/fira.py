"""Fira: GaLore, and what is left of the gradient, scaled by norms (Chen et al. 2024, arXiv:2410.01623)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from ray_peft.methods.projected_gradients import SingularSubspaces

if TYPE_CHECKING:
    from ray_peft.methods.optim.low_rank_rules import ProjectBack


class Fira(SingularSubspaces):
    """Train every weight with an update of full rank, and the moments of one of low rank."""

    name: Literal["fira"] = "fira"
    title: ClassVar[str] = "Fira"

    def rule(self) -> ProjectBack:
        """GaLore's update and the scaled rest."""
        from ray_peft.methods.optim.low_rank_rules import ScaledRest

        return ScaledRest()
