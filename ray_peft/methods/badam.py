"""BAdam: AdamW on one layer at a time, over and over (Luo et al. 2024, arXiv:2404.02827)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ray_peft.methods.turns import LayersInTurn

if TYPE_CHECKING:
    from collections.abc import Sequence


class BAdam(LayersInTurn):
    """Block coordinate descent: every block gets a turn before one gets another. The vocabulary is not trained."""

    name: Literal["badam"] = "badam"
    trains_the_rest: ClassVar[bool] = False
    order: Literal["random", "descending", "ascending"] = "random"
    """The order of blocks in a round; random draws another for each round."""
    every: int = Field(default=100, ge=1)
    """Optimizer steps of a turn; the paper's K."""
    lr: float = Field(default=5.0e-5, gt=0)

    def chosen(self, turn: int, count: int, seed: int) -> Sequence[int]:
        """The block whose turn it is."""
        played, place = divmod(turn, count)
        order = list(range(count))
        if self.order == "random":
            random.Random(f"{seed} {played}").shuffle(order)
        return [order[count - 1 - place if self.order == "descending" else place]]
