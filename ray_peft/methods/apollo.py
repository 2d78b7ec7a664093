"""APOLLO: the gradient, scaled as AdamW would in a random subspace (Zhu et al. 2024, arXiv:2412.05270)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.projected_gradients import ProjectedGradients

if TYPE_CHECKING:
    from ray_peft.methods.optim.low_rank_rules import ProjectBack


class ScaledGradients(ProjectedGradients):
    """A stage that trains every weight; the target matrices learn at rates that AdamW finds in a random subspace."""

    done_to_targets: ClassVar[str] = "scaled in random subspaces"
    by_matrix: ClassVar[bool]
    """One rate for a matrix, and not one for each column or row."""

    def rule(self) -> ProjectBack:
        """The scaled gradient."""
        from ray_peft.methods.optim.low_rank_rules import ScaledGradient

        return ScaledGradient(by_matrix=self.by_matrix)


class APOLLO(ScaledGradients):
    """A rate for each column of a wide matrix, or row of a tall one."""

    name: Literal["apollo"] = "apollo"
    title: ClassVar[str] = "APOLLO"
    by_matrix: ClassVar[bool] = False
    rank: int = Field(default=128, ge=1)
    """Dimension of the random subspace; moments of an (m, n) matrix take rank * max(m, n) numbers."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on the update."""


class APOLLOMini(ScaledGradients):
    """A single rate for each matrix: as little state as plain gradient descent needs."""

    name: Literal["apollo_mini"] = "apollo_mini"
    title: ClassVar[str] = "APOLLO-mini"
    by_matrix: ClassVar[bool] = True
    rank: int = Field(default=1, ge=1)
    """Dimension of the random subspace."""
    scale: float = Field(default=128**0.5, gt=0)
    """Factor on the update; the paper's, the root of 128."""
