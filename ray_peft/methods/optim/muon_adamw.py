"""Muon over matrices: momentum whose singular values are all made about one; plain AdamW over the other weights.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. The factor on the learning rate, by which an
update is as large as AdamW's, is that of Liu et al. 2025, arXiv:2502.16982. `torch.optim.Muon` is the same arithmetic;
this one takes all matrices of a shape at once, and rounds weights and momentum in bfloat16 stochastically.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ray_peft.methods.optim.piecewise_adamw import Layerwise, PiecewiseAdamW, stacked
from ray_peft.methods.stochastic import rounded

MOMENTUM = "momentum_buffer"
"""Key of a weight's state."""
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial of degree five that a round applies to all singular values."""
_EPS = 1e-7
_SIZE_OF_ADAMW = 0.2
"""Root of the mean square of AdamW's updates, as Liu et al. measured it."""


class MuonAdamW(PiecewiseAdamW):
    """Muon in the groups that have a `momentum`, AdamW in the others."""

    def _update_group(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        if "momentum" not in group:
            super()._update_group(group, parameters)
            return
        for parameter in parameters:  # before the tensors of an update, between which they would lie
            if MOMENTUM not in self.state[parameter]:
                self.state[parameter][MOMENTUM] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        for batch in self._batches(parameters):
            self._update_matrices(group, batch)

    def _update_matrices(self, group: dict[str, Any], batch: list[Tensor]) -> None:
        states = [self.state[parameter] for parameter in batch]
        dtype, momentum = self._arithmetic(batch[0]), group["momentum"]
        gradient = stacked([self._gradient(parameter) for parameter in batch]).to(dtype, copy=True)
        mean = stacked([state[MOMENTUM] for state in states]).to(dtype, copy=True).lerp_(gradient, 1 - momentum)
        update = orthogonalised(gradient.lerp_(mean, momentum) if group["nesterov"] else mean, group["rounds"])
        del gradient
        rows, columns = batch[0].shape
        weight = stacked(batch).to(dtype, copy=True)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * _SIZE_OF_ADAMW * max(rows, columns) ** 0.5)
        generator = self._dice.generator(batch[0], states[0]["step"]) if self._stochastic else None

        def stored(values: Tensor) -> list[Tensor]:
            new = rounded(values, batch[0].dtype, generator) if self._stochastic else values.to(batch[0].dtype)
            return list(new.unbind())

        torch._foreach_copy_([parameter.detach() for parameter in batch], stored(weight))
        torch._foreach_copy_([state[MOMENTUM] for state in states], stored(mean))


class LayerwiseMuonAdamW(Layerwise, MuonAdamW):
    """Muon's, a weight at a time in the backward pass."""


def orthogonalised(matrices: Tensor, rounds: int) -> Tensor:
    """Matrices (matrix, m, n) with singular values near one, in bfloat16, by Newton-Schulz iteration.

    The polynomial rises steeply at zero and does not converge to one: singular values end between 0.7 and 1.2.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    result = (matrices.mT if tall else matrices).bfloat16()
    result = result / torch.linalg.matrix_norm(result, keepdim=True).clamp_min(_EPS)
    for _ in range(rounds):
        gram = result @ result.mT
        result = torch.baddbmm(result, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return result.mT if tall else result
