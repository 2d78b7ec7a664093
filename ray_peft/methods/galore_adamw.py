"""GaLore's AdamW: the algorithm of galore-torch, over all matrices of one shape at once, without waiting for the GPU.

galore-torch keeps a projector object in the optimizer's state. This optimizer keeps only its matrix, so that a
checkpoint holds nothing but tensors and numbers. The host waits for the GPU only when new subspaces are computed, every
`update_proj_gap` steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ray_peft.methods import fused, moments, subspace
from ray_peft.methods.moments import Piece
from ray_peft.methods.optim.low_rank_rules import ProjectBack, Subspace, drawn
from ray_peft.methods.optim.piecewise_adamw import Layerwise, PiecewiseAdamW, listed, stacked

BASIS = "ortho_matrix"
"""Key of a weight's state: its basis, or the left and the right basis for `proj_type: full`."""
_OF_REFRESH, _OF_MOMENTS = -1, -2
"""Which random numbers of a weight: those that its first basis starts from, and those that round its moments."""


class GaLoreAdamW(PiecewiseAdamW):
    """AdamW whose moments live in a subspace of the gradient, in the groups that have a `rank`.

    Source: Zhao et al. 2024, arXiv:2403.03507, algorithm 2; `eps` and weight decay as in galore-torch 1.0.
    """

    grams_at_a_time = subspace.AT_A_TIME
    """How many numbers of Gram matrices are iterated at a time: more is faster."""

    def __init__(
        self, groups: Iterable[dict[str, object]], *, rule: ProjectBack | None = None, **settings: Any
    ) -> None:
        """Set up the optimizer.

        Args:
            groups: of weights. Groups with `rank`, `update_proj_gap`, `scale`, `proj_type` and `svd` are projected.
            rule: what becomes of the direction in a subspace; None is GaLore's.
            **settings: as `PiecewiseAdamW`.
        """
        super().__init__(groups, **settings)
        self._rule = rule or ProjectBack()

    def _update_group(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        if "rank" not in group:
            super()._update_group(group, parameters)
            return
        if not self._rule.draws_bases:
            self._refresh(group, parameters)
        self._make_moments(parameters, [self._projected_shape(group, parameter) for parameter in parameters])
        for batch in self._batches(parameters):
            self._update_projected(group, batch)

    def _projected_shape(self, group: dict[str, Any], parameter: Tensor) -> tuple[int, ...]:
        rank = group["rank"] if self._rule.draws_bases else min(group["rank"], *parameter.shape)
        return subspace.projected_shape(parameter.shape, rank, subspace.side_of(parameter.shape, group["proj_type"]))

    def _refresh(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """Compute new bases for the weights that have none, and for all weights every `update_proj_gap` steps."""
        due = [
            parameter
            for parameter in parameters
            if BASIS not in self.state[parameter] or (self.state[parameter]["step"] - 1) % group["update_proj_gap"] == 0
        ]
        iterated = []
        for parameter in due:
            side = subspace.side_of(parameter.shape, group["proj_type"])
            if group.get("svd", "exact") == "randomized" and subspace.can_iterate(parameter.shape, side):
                iterated.append(parameter)
                continue
            bases = subspace.exact(self._gradient(parameter), group["rank"], side)
            self.state[parameter][BASIS] = bases if side == "full" else bases[0]
        bases_by_place = subspace.iterated(iterated, self._gradient, self._start, group["rank"], self.grams_at_a_time)
        for place, basis in bases_by_place.items():
            self.state[iterated[place]][BASIS] = basis

    def _start(self, parameter: Tensor, columns: int) -> Tensor:
        """The previous basis, and random columns up to `columns`, which depend on seed, step and place alone."""
        generator = self._dice.generator(parameter, self.state[parameter]["step"], _OF_REFRESH)
        size = (min(parameter.shape), columns)
        start = torch.randn(size, generator=generator, device=parameter.device, dtype=torch.float32).double()
        basis = self.state[parameter].get(BASIS)
        if basis is not None:
            previous = (basis.mT if parameter.shape[0] >= parameter.shape[1] else basis)[:, :columns]
            start[:, : previous.shape[1]] = previous
        return start

    def _bases(self, group: dict[str, Any], parameter: Tensor, side: str) -> list[Tensor]:
        """The bases of a weight's gradient: those of its state, or drawn anew from seed, place and step."""
        if not self._rule.draws_bases:
            return listed(self.state[parameter][BASIS])
        gap = group["update_proj_gap"]
        since = (self.state[parameter]["step"] - 1) // gap * gap + 1
        generator = self._dice.generator(parameter, since, _OF_REFRESH)
        return [drawn(parameter.shape, group["rank"], side, parameter, generator)]

    def _update_projected(self, group: dict[str, Any], batch: list[Tensor]) -> None:
        if self._stochastic and fused.serves(batch[0]):
            for parameter in batch:
                self._update_projected_fused(group, parameter)
            return
        states = [self.state[parameter] for parameter in batch]
        side = subspace.side_of(batch[0].shape, group["proj_type"])
        bases = [stacked(parts) for parts in zip(*(self._bases(group, p, side) for p in batch), strict=True)]
        low = subspace.projected(self._gradients(batch), bases, side)
        pieces = [Piece(state, 0, state[moments.NAMES[0]].numel()) for state in states]
        dtype = self._arithmetic(batch[0])
        changed, direction = self._direction(group, pieces, low.to(dtype).reshape(-1), dtype)
        direction = direction.to(low.dtype).view(low.shape)
        step = Subspace(lambda: self._gradients(batch), low, direction, bases, side, group["scale"], states)
        back, factor = self._rule.update(step)
        del low, direction, step
        weight = stacked(batch).to(dtype, copy=True)
        self._move(group, weight, back.mul_(factor), states[0]["step"])
        del back
        self._store([(parameter, 0, parameter.numel()) for parameter in batch], weight.view(-1), pieces, changed)

    def _gradients(self, batch: Sequence[Tensor]) -> Tensor:
        return stacked([self._gradient(parameter) for parameter in batch])

    def _update_projected_fused(self, group: dict[str, Any], parameter: Tensor) -> None:
        state, side = self.state[parameter], subspace.side_of(parameter.shape, group["proj_type"])
        bases = self._bases(group, parameter, side)
        direction = subspace.projected(self._gradient(parameter), bases, side).contiguous()
        low = direction.clone() if self._rule.needs_low else direction
        piece = Piece(state, 0, direction.numel())
        settings = {"betas": group["betas"], "eps": group["eps"], "seed": self._seed(parameter, _OF_MOMENTS)}
        self._with_moments(piece, lambda both: fused.to_direction(direction, both, **settings))
        step = Subspace(lambda: self._gradient(parameter), low, direction, bases, side, group["scale"], [state])
        back, factor = self._rule.update(step)
        size, decay = self._size(group, state["step"]) * factor, group["lr"] * group["weight_decay"]
        fused.move(parameter.detach(), back.contiguous(), size=size, decay=decay, seed=self._seed(parameter, 0))


class LayerwiseGaLoreAdamW(Layerwise, GaLoreAdamW):
    """GaLore's, a weight at a time in the backward pass."""
