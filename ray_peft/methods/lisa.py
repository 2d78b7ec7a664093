"""LISA: a few random layers are trained at a time, the vocabulary always (Pan et al. 2024, arXiv:2403.17919)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.turns import LayersInTurn

if TYPE_CHECKING:
    from collections.abc import Sequence


class LISA(LayersInTurn):
    """AdamW on embeddings, output layer, last norm and `layers` blocks, which are drawn anew for each turn."""

    name: Literal["lisa"] = "lisa"
    trains_the_rest: ClassVar[bool] = True
    layers: int = Field(default=2, ge=1)
    """Blocks that are trained at a time; the paper's gamma."""
    every: int = Field(default=20, ge=1)
    """Optimizer steps of a turn; the paper's K."""
    lr: float = Field(default=5.0e-5, gt=0)

    def chosen(self, turn: int, count: int, seed: int) -> Sequence[int]:
        """Drawn without replacement, each layer as likely as any other."""
        return random.Random(f"{seed} {turn}").sample(range(count), min(self.layers, count))
