"""Which layers an optimizer trains for how long: the others have no gradients and no moments meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

STEPS = "steps_in_turns"
"""Key of the optimizer's first group: optimizer steps that were done."""
Choice: TypeAlias = Callable[[int, int], Sequence[int]]
"""The layers of a turn, by its number and the trial's seed."""


def train_in_turns(
    optimizer: Optimizer, layers: Sequence[Sequence[nn.Parameter]], choice: Choice, every: int
) -> Optimizer:
    """Have an optimizer train some layers for `every` steps, then others.

    A layer that rests takes no gradient, and the optimizer forgets its moments: it starts anew in its next turn.

    Args:
        optimizer: over the parameters of the layers, and over what is trained all the time.
        layers: the parameters of each layer.
        choice: the layers of each turn.
        every: optimizer steps of a turn.

    Returns:
        The optimizer.
    """
    import torch

    seed = torch.initial_seed()

    def begin_turn() -> None:
        chosen = set(choice(optimizer.param_groups[0][STEPS] // every, seed))
        for number, layer in enumerate(layers):
            for parameter in layer:
                parameter.requires_grad_(number in chosen)
                if number not in chosen:
                    parameter.grad = None
                    optimizer.state.pop(parameter, None)

    def after_step(*_: Any) -> None:
        optimizer.param_groups[0][STEPS] += 1
        if optimizer.param_groups[0][STEPS] % every == 0:
            begin_turn()

    optimizer.param_groups[0][STEPS] = 0
    begin_turn()
    optimizer.register_step_post_hook(after_step)
    optimizer.register_load_state_dict_post_hook(lambda _: begin_turn())
    return optimizer
