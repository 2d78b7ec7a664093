"""What methods share that train some layers of a model at a time."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ray_peft.methods.base import Task
from ray_peft.methods.full_weights import AdamWWeights
from ray_peft.reach.blocks import blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from torch.optim import Optimizer


class LayersInTurn(AdamWWeights):
    """A stage that trains a few layers for `every` steps, then others; gradients and moments are of those alone."""

    tasks: ClassVar[frozenset[Task]] = frozenset({"llm_sft"})
    trains_the_rest: ClassVar[bool]
    """Whether what is in no layer, such as the vocabulary and the last norm, is trained all the time; else never."""
    every: int = Field(ge=1)
    """Optimizer steps of a turn."""

    def conflicts(self, *, accumulates: bool, num_workers: int) -> list[str]:
        """Workers add up the gradients of all weights."""
        conflicts = super().conflicts(accumulates=accumulates, num_workers=num_workers)
        if num_workers > 1:
            conflicts.append(
                f"method {self.name} has gradients of some layers alone, which workers cannot add up yet; set "
                f"resources.num_workers: 1 (found {num_workers})"
            )
        return conflicts

    def why_not_recorded(self) -> str | None:
        """A recorded pass computes the gradients of the layers that were trained as it was recorded."""
        return f"{self.name} trains other layers after {self.every} steps"

    @abstractmethod
    def chosen(self, turn: int, count: int, seed: int) -> Sequence[int]:
        """The layers of a turn, of `count`; the same for equal arguments."""

    def attach(self, model: nn.Module) -> nn.Module:
        """Mark as trained what ever has its turn, or is trained all the time."""
        model = super().attach(model)
        if not self.trains_the_rest:
            model.requires_grad_(False)
            for block in blocks(model):
                block.requires_grad_(True)
        return model

    def optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW that begins with the layers of the first turn, and goes on to others by itself."""
        from ray_peft.methods.optim.layers_in_turn import train_in_turns

        layers = [list(block.parameters()) for block in blocks(model)]
        optimizer = super().optimizer(model)
        return train_in_turns(optimizer, layers, lambda turn, seed: self.chosen(turn, len(layers), seed), self.every)

    def check(self, model: nn.Module, *, of: str, key: str) -> list[str]:
        """How many layers there are, and what is trained beside them.

        Raises:
            ModelError: the model has no list of layers.
        """
        count = len(blocks(model, of=of))
        at_once = len(self.chosen(0, count, 0))
        beside = "all else is trained all the time" if self.trains_the_rest else "nothing else is trained"
        return [f"{self.name}: {at_once} of the {count} layers of {of} are trained at a time; {beside}"]
