"""galore-torch's AdamW with a state that saves and loads as plain tensors, whole or layer by layer.

The reference keeps a `GaLoreProjector` object in the optimizer's state: a checkpoint then needs unpickling of
foreign classes, and the projection matrix stays on the device where it was loaded.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from galore_torch import GaLoreAdamW as ReferenceGaLoreAdamW
from galore_torch.galore_projector import GaLoreProjector

from ray_peft.methods.stochastic import Dice, adamw_step, rounded

_MATRIX = "ortho_matrix"
_SUBSPACE = ("rank", "update_proj_gap", "scale", "proj_type")


class GaLoreAdamW(ReferenceGaLoreAdamW):  # type: ignore[misc]  # galore-torch has no annotations
    """The reference optimizer; `state_dict` holds tensors and numbers only."""

    param_groups: list[dict[str, Any]]

    def __init__(self, groups: Iterable[dict[str, object]], **settings: object) -> None:
        super().__init__(groups, no_deprecation_warning=True, **settings)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state; each projector is stored as its matrix."""
        packed: dict[str, Any] = super().state_dict()
        packed["state"] = {key: _without_projector(state) for key, state in packed["state"].items()}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; each projector is rebuilt from its group's settings, on its weight's device."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state.get(parameter, {})
                if _MATRIX in state:
                    projector = GaLoreProjector(**{key: group[key] for key in _SUBSPACE})
                    projector.ortho_matrix = state.pop(_MATRIX)
                    state["projector"] = projector


def _without_projector(state: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in state.items() if key != "projector"}
    if "projector" in state:
        plain[_MATRIX] = state["projector"].ortho_matrix
    return plain


class StochasticGaLoreAdamW(GaLoreAdamW):
    """The same algorithm on bfloat16 weights and moments, rounded stochastically.

    Moments and updates are computed in float32; the products with the basis in the weights' dtype, as in the reference.
    """

    def __init__(self, groups: Iterable[dict[str, object]], **settings: object) -> None:
        super().__init__(groups, **settings)
        self._dice = Dice(parameter for group in self.param_groups for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            if "rank" not in group:
                adamw_step(group["params"], self.state, group, self._dice, eps_from_source=True)
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _projected_step(parameter, self.state[parameter], group, self._dice)


def _projected_step(parameter: torch.Tensor, state: dict[str, Any], group: dict[str, Any], dice: Dice) -> None:
    if "projector" not in state:
        state["projector"] = GaLoreProjector(**{key: group[key] for key in _SUBSPACE})
    state.setdefault("step", 0)
    grad = state["projector"].project(parameter.grad, state["step"]).float()
    if "exp_avg" not in state:
        state |= {name: torch.zeros_like(grad, dtype=parameter.dtype) for name in ("exp_avg", "exp_avg_sq")}
    state["step"] += 1
    beta1, beta2 = group["betas"]
    root = math.sqrt(1 - beta2 ** state["step"])
    first = state["exp_avg"].float().lerp_(grad, 1 - beta1)
    second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    direction = first / second.sqrt().add_(group["eps"])
    back = state["projector"].project_back(direction.to(parameter.dtype))
    weight = parameter.float().add_(back, alpha=-group["lr"] * root / (1 - beta1 ** state["step"]))
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    generator = dice.thrown(parameter, state["step"])
    for kept, values in ((parameter, weight), (state["exp_avg"], first), (state["exp_avg_sq"], second)):
        kept.copy_(rounded(values, kept.dtype, generator))


def galore_adamw(*, layerwise: bool, stochastic: bool) -> type[GaLoreAdamW]:
    """The optimizer's class.

    Args:
        layerwise: step one weight as soon as its gradient is accumulated, then free the gradient; `step` finds
            nothing left to do. The state, the schedule, weight decay and checkpoints are the same.
        stochastic: round what is stored in bfloat16 stochastically.
    """
    kind: type[GaLoreAdamW] = StochasticGaLoreAdamW if stochastic else GaLoreAdamW
    return _layerwise(kind) if layerwise else kind


def _layerwise(kind: type[GaLoreAdamW]) -> type[GaLoreAdamW]:
    class Layerwise(kind):  # type: ignore[valid-type, misc]  # a class made from a class
        param_groups: list[dict[str, Any]]
        worst: torch.Tensor | float = 0.0
        """Zero, or NaN once a gradient was not finite."""

        def __init__(self, groups: Iterable[dict[str, object]], **settings: object) -> None:
            super().__init__(groups, **settings)
            for index, group in enumerate(self.param_groups):
                for parameter in group["params"]:
                    parameter.register_post_accumulate_grad_hook(self._stepper(index))

        def _stepper(self, index: int) -> Any:
            # The collector cannot see through a tensor's hooks: one that held the optimizer, and with it the weights,
            # would keep all of them for the life of the process.
            found = weakref.ref(self)

            def step_one(parameter: torch.Tensor) -> None:
                self = found()
                if self is None:  # a later stage trains with another optimizer
                    return
                assert parameter.grad is not None
                # Zero times a sum is zero, or NaN where a number is not finite: nothing waits for the GPU.
                self.worst = self.worst + parameter.grad.sum(dtype=torch.float32) * 0
                groups = self.param_groups
                self.param_groups = [{**groups[index], "params": [parameter]}]
                try:
                    kind.step(self)
                finally:
                    self.param_groups = groups
                parameter.grad = None

            return step_one

    return Layerwise
