"""GaLore: full weights, AdamW's moments in a low-rank subspace of the gradient (Zhao et al. 2024, arXiv:2403.03507)."""

from __future__ import annotations

from typing import ClassVar, Literal

from ray_peft.methods.projected_gradients import SingularSubspaces


class GaLore(SingularSubspaces):
    """Train every weight; gradients of the target matrices are projected to `rank` before AdamW sees them."""

    name: Literal["galore"] = "galore"
    title: ClassVar[str] = "GaLore"
