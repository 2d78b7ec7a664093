"""`modules_to_save`: modules that are trained whole beside an adapter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ray_peft.errors import ModelError
from ray_peft.reach.shared_weights import refuse_head_and_tied
from ray_peft.reach.targets import endings, named_by

if TYPE_CHECKING:
    from torch import nn


def check_modules(names: Iterable[str], model: nn.Module, *, of: str, key: str) -> None:
    """Refuse names that mean no module with weights of its own, or one whose weights are used elsewhere, too.

    Args:
        names: ends of modules' names.
        model: on any device.
        of: the model as an error names it.
        key: the setting as an error names it.

    Raises:
        ModelError: there is such a name.
    """
    owners = {name: list(module.parameters(recurse=False)) for name, module in model.named_modules()}
    owners = {name: weights for name, weights in owners.items() if weights}
    for target in names:
        chosen = [name for name in owners if named_by(target, name)]
        if not chosen:
            available = ", ".join(endings(owners))
            raise ModelError(f"{key}: {target} is no module of {of} with weights of its own; those end in {available}")
        stored = [name for name in chosen if not all(weight.is_floating_point() for weight in owners[name])]
        if stored:
            raise ModelError(f"{key}: {stored[0]} of {of} is quantised, so it cannot be trained whole; leave it out")
        refuse_head_and_tied(model, chosen, of=of, key=key)
