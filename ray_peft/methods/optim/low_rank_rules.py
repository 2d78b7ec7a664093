"""What an optimizer does with the direction that AdamW takes in a subspace of the gradient: GaLore, Fira, APOLLO.

A rule sees all matrices of one shape at once, or a single one without the axis of matrices, and keeps nothing of its
own but a norm in the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ray_peft.methods import subspace

NORM = "scaled_norm"
"""Key of a weight's state: the norm () of what was added outside of the subspace at the last step."""
GROWTH = 1.01
"""Largest growth of that norm from one step to the next: the norm-growth limiter of Fira, section 4.3."""
_EPS = 1e-8


@dataclass(frozen=True)
class Subspace:
    """One step of several gradients (matrix, m, n) in their subspaces."""

    gradient: Callable[[], Tensor]
    """The gradients; called as late as possible, since several are copied for it."""
    low: Tensor
    """The gradients in the subspace: (matrix, m, rank) for the side `right`, (matrix, rank, n) for `left`."""
    direction: Tensor
    """AdamW's first moment there, divided by the root of its second; of the same shape."""
    bases: Sequence[Tensor]
    side: str
    scale: float
    states: Sequence[dict[str, Any]]
    """The optimizer's, one for each matrix."""


class ProjectBack:
    """GaLore: the direction is projected back, and times `scale` the update (Zhao et al. 2024, algorithm 2)."""

    draws_bases: ClassVar[bool] = False
    """Subspaces are drawn at random, the same for `update_proj_gap` steps, and never stored."""
    needs_low: ClassVar[bool] = False
    """The gradient in the subspace is needed beside the direction there."""

    def update(self, step: Subspace) -> tuple[Tensor, float]:
        """The update (matrix, m, n) and a factor on it; the learning rate comes on top."""
        return subspace.projected_back(step.direction, step.bases, step.side), step.scale


class ScaledRest(ProjectBack):
    """Fira: GaLore's update, and the rest of the gradient scaled as AdamW scales what is in the subspace.

    Each column (of a side `left`; else each row) gets a factor of its own: the norm of the direction in the subspace by
    that of the gradient there. `scale` is also the share of the projected gradient that counts as inside, as in the
    authors' code. Source: Chen et al. 2024, arXiv:2410.01623, algorithm 1 and section 4.
    """

    needs_low: ClassVar[bool] = True

    def update(self, step: Subspace) -> tuple[Tensor, float]:
        """As GaLore's, with the scaled rest."""
        inside = subspace.projected_back(step.low, step.bases, step.side).mul_(step.scale)
        rest = torch.sub(step.gradient(), inside, out=inside)
        limited(rest.mul_(_factors(step)), step.states)
        back = subspace.projected_back(step.direction, step.bases, step.side)
        return back.mul_(step.scale).add_(rest), 1.0


class ScaledGradient(ProjectBack):
    """APOLLO: the whole gradient, scaled as AdamW would scale it in a random subspace.

    Source: Zhu et al. 2024, arXiv:2412.05270, algorithm 1.
    """

    draws_bases: ClassVar[bool] = True
    needs_low: ClassVar[bool] = True

    def __init__(self, *, by_matrix: bool) -> None:
        """`by_matrix`: one factor for a matrix (APOLLO-mini), and not one for each column or row."""
        self._by_matrix = by_matrix

    def update(self, step: Subspace) -> tuple[Tensor, float]:
        """The gradient times the factors, held in its growth."""
        scaled = step.gradient() * _factors(step, whole=self._by_matrix)
        limited(scaled, step.states)
        return scaled, step.scale


def drawn(shape: torch.Size, rank: int, side: str, weight: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random basis of a gradient (m, n), of variance 1 / rank: (rank, n) for the side `right`, (m, rank) for `left`.

    Args:
        shape: of the gradient.
        rank: of the basis.
        side: as `subspace.side_of` gives it.
        weight: whose device and dtype the basis has.
        generator: of the random numbers.
    """
    size = (rank, shape[1]) if side == "right" else (shape[0], rank)
    numbers = torch.randn(size, generator=generator, device=weight.device, dtype=torch.float32)
    return numbers.mul_(rank**-0.5).to(weight.dtype)


def limited(update: Tensor, states: Sequence[dict[str, Any]]) -> None:
    """Shrink updates (matrix, m, n) in place whose norm would grow by more than `GROWTH`; keeps the norms."""
    norms = torch.linalg.vector_norm(update, dim=(-2, -1), dtype=torch.float32).view(len(states))
    if NORM in states[0]:
        before = torch.stack([state[NORM] for state in states])
        excess = (norms / (before + _EPS)).clamp_min_(GROWTH).div_(GROWTH)
        update.div_(excess.view(*update.shape[:-2], 1, 1))
        norms = norms / excess
    for state, norm in zip(states, norms.unbind(), strict=True):
        state[NORM] = norm.clone()


def _factors(step: Subspace, *, whole: bool = False) -> Tensor:
    """AdamW's scale in the subspace: (matrix, m, 1) for `right`, (matrix, 1, n) for `left`, else (matrix, 1, 1)."""
    axes: Any = {"right": -1, "left": -2}.get(step.side, (-2, -1))
    if whole:
        axes = (-2, -1)
    of_direction, of_gradient = (
        torch.linalg.vector_norm(part, dim=axes, keepdim=True, dtype=torch.float32)
        for part in (step.direction, step.low)
    )
    factors: Tensor = of_direction / (of_gradient + _EPS)
    return factors.to(step.low.dtype)
