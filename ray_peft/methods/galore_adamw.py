"""galore-torch's AdamW with a state that saves and loads as plain tensors, whole or layer by layer.

The reference keeps a `GaLoreProjector` object in the optimizer's state: a checkpoint then needs unpickling of
foreign classes, and the projection matrix stays on the device where it was loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from galore_torch import GaLoreAdamW as ReferenceGaLoreAdamW
from galore_torch.galore_projector import GaLoreProjector

_MATRIX = "ortho_matrix"


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
                    settings = {key: group[key] for key in ("rank", "update_proj_gap", "scale", "proj_type")}
                    projector = GaLoreProjector(**settings)
                    projector.ortho_matrix = state.pop(_MATRIX)
                    state["projector"] = projector


def _without_projector(state: dict[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in state.items() if key != "projector"}
    if "projector" in state:
        plain[_MATRIX] = state["projector"].ortho_matrix
    return plain


class LayerwiseGaLoreAdamW(GaLoreAdamW):
    """Steps one weight as soon as its gradient is accumulated, then frees the gradient.

    The state, the schedule, weight decay and checkpoints are those of `GaLoreAdamW`; `step` finds nothing left to do.
    """

    def __init__(self, groups: Iterable[dict[str, object]], **settings: object) -> None:
        super().__init__(groups, **settings)
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._stepper(index))

    def _stepper(self, index: int) -> Any:
        def step_one(parameter: torch.Tensor) -> None:
            groups = self.param_groups
            self.param_groups = [{**groups[index], "params": [parameter]}]
            try:
                ReferenceGaLoreAdamW.step(self)
            finally:
                self.param_groups = groups
            parameter.grad = None

        return step_one
