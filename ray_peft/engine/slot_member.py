"""A member whose adapter lies in a slot. Its checkpoints are those of a trial alone, so it can resume either way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_peft.engine.contract import Rows
from ray_peft.engine.member import Job, Member
from ray_peft.engine.slots import Piece, Slots


class SlotMember(Member):
    """One of several members on a base."""

    def __init__(self, job: Job, slots: Slots, slot: int, pieces: Sequence[Piece], rows: Rows[Any]) -> None:
        """Prepare for the first step.

        Args:
            job: the stage.
            slots: the adapters of all members.
            slot: that of its own adapter.
            pieces: where its matrices lie in the slot, in the parameters' order of a trial alone.
            rows: what its steps see.
        """
        super().__init__(job, slots.member(slot), rows)
        self.slot = slot
        self._pieces = pieces

    def state(self) -> dict[str, Any]:
        """All that a checkpoint needs, matrix by matrix."""
        state = super().state()
        return state | {"parameters": self._apart(self.parameters[0]), "optimizer": self._optimizer_apart()}

    def restore(self, state: dict[str, Any], where: Path) -> None:
        """Go on from `state` of a member, or of a trial alone."""
        together = {
            "parameters": [self._together(state["parameters"])],
            "optimizer": self._optimizer_together(state["optimizer"]),
        }
        super().restore(state | together, where)

    def _apart(self, row: Tensor) -> list[Tensor]:
        return [piece.cut(row.detach()) for piece in self._pieces]

    def _together(self, matrices: Sequence[Tensor]) -> Tensor:
        row = torch.zeros(self.parameters[0].shape, dtype=matrices[0].dtype, device=matrices[0].device)
        for piece, matrix in zip(self._pieces, matrices, strict=True):
            piece.put(row, matrix)
        return row

    def _optimizer_apart(self) -> dict[str, Any]:
        """The state of an optimizer with one parameter for each matrix."""
        whole = self.optimizer.state_dict()
        (group,) = whole["param_groups"]
        numbers = list(range(len(self._pieces)))
        states: dict[int, dict[str, Any]] = {number: {} for number in numbers if whole["state"]}
        for name, value in whole["state"].get(0, {}).items():
            matrices = self._apart(value) if _is_row(value) else [value.clone() for _ in numbers]
            for number, matrix in zip(numbers, matrices, strict=True):
                states[number][name] = matrix
        return {"state": states, "param_groups": [{**group, "params": numbers}]}

    def _optimizer_together(self, apart: dict[str, Any]) -> dict[str, Any]:
        (group,) = apart["param_groups"]
        first = apart["state"].get(0, {})
        row = {
            name: self._together([apart["state"][number][name] for number in group["params"]])
            if _is_row(value)
            else value
            for name, value in first.items()
        }
        return {"state": {0: row} if row else {}, "param_groups": [{**group, "params": [0]}]}


def _is_row(value: Tensor) -> bool:
    """True for a moment, false for a count of steps."""
    return value.ndim == 2
