"""Muon: momentum with singular values of about one as the update of matrices (Jordan et al. 2024, arXiv:2502.16982)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.matrix_weights import MatrixWeights

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim import Optimizer


class Muon(MatrixWeights):
    """Train every weight; a target matrix moves equally far along all its singular vectors."""

    name: Literal["muon"] = "muon"
    title: ClassVar[str] = "Muon"
    done_to_targets: ClassVar[str] = "trained by Muon"
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of the running mean of gradients."""
    nesterov: bool = True
    """Look ahead: mix the newest gradient into the mean once more."""
    rounds: int = Field(default=5, ge=1, lt=100)
    """Rounds of the iteration that makes singular values equal."""
    lr: float = Field(default=2.0e-5, gt=0)
    """Peak learning rate, in AdamW's units: updates of matrices are as large as AdamW's would be."""

    def for_targets(self) -> dict[str, object]:
        """Momentum and rounds."""
        return {"momentum": self.momentum, "nesterov": self.nesterov, "rounds": self.rounds}

    def optimizer_kind(self) -> Callable[..., Optimizer]:
        """Muon and AdamW in one."""
        from ray_peft.methods.optim.muon_adamw import LayerwiseMuonAdamW, MuonAdamW

        return LayerwiseMuonAdamW if self.layerwise else MuonAdamW
