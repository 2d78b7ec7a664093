"""The blocks that a model stacks: its layers, as people count them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_peft.errors import ModelError

if TYPE_CHECKING:
    from torch import nn


def blocks(model: nn.Module, *, of: str = "the model") -> list[nn.Module]:
    """The blocks in order, such as the decoder layers of a language model: the longest list of modules in no other one.

    Args:
        model: on any device.
        of: the model as an error names it.

    Raises:
        ModelError: it has no list of modules.
    """
    from torch import nn

    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    if not lists:
        raise ModelError(f"{of} has no list of layers of which some could be trained at a time; use method full")
    longest: nn.ModuleList = max(lists.values(), key=len)
    return list(longest)
