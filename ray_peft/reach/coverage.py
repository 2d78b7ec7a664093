"""How much of a model a method reaches, in words: by adapters, by projected gradients, by 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray_peft.reach.targets import (
    PROJECTIONS,
    Targets,
    endings,
    fused_experts,
    in_blocks,
    linear,
    numbers,
    smaller_side,
)

if TYPE_CHECKING:
    from torch import nn

MOST_OF = 0.9
"""If adapters reach this share of the blocks' weights, no note is needed."""


def adapter_notes(model: nn.Module, targets: Targets, rank: int, *, of: str, by_default: bool) -> list[str]:
    """Notes on where adapters go if the architecture decides it, on layers without one, and on ranks without effect.

    Args:
        model: on any device.
        targets: what gets an adapter.
        rank: of the adapters.
        of: the model in words.
        by_default: the user named no targets of their own.
    """
    notes = []
    places = [*endings(targets.layers), *targets.parameters]
    if by_default and set(places) != set(PROJECTIONS):
        notes.append(f"adapters go beside {', '.join(places)}, the layers of a block of {of}")
    if by_default:
        notes += _without(model, targets)
    experts = fused_experts(model)
    sizes = [smaller_side(model.get_submodule(name)) for name in targets.layers]
    sizes += [smaller_side(experts[name]) for name in targets.experts]
    return notes + rank_notes(rank, sizes, "an adapter's rank", "an update of such a layer")


def rank_notes(rank: int, sizes: Sequence[int], name: str, bounded: str) -> list[str]:
    """A note on a rank that is above the smaller side of some layers, or of all."""
    narrow = [size for size in sizes if rank > size]
    if not narrow:
        return []
    layers = "every target layer" if len(narrow) == len(sizes) else f"{len(narrow)} of {len(sizes)} target layers"
    least, most = min(narrow), max(narrow)
    span = f"{least} to {most}" if most > least else f"{least}"
    return [f"{name} of {rank} is above the smaller side of {layers} ({span}), which bounds the rank of {bounded}"]


def _without(model: nn.Module, targets: Targets) -> list[str]:
    """A note on the blocks' weights that have no adapter, if they are more than a small part."""
    sizes = block_weights(model)
    total = sum(sizes.values())
    unreached = {name: size for name, size in sizes.items() if name not in {*targets.layers, *targets.experts}}
    share = 1 - sum(unreached.values()) / total if total else 1.0
    if share >= MOST_OF:
        return []
    names = in_words(unreached, total)
    return [f"adapters reach {share:.0%} of the weights of the model's blocks; none goes beside {names}"]


def block_weights(model: nn.Module) -> dict[str, int]:
    """Numbers of each linear layer and each fused expert parameter in the model's repeated blocks, by name."""
    layers = linear(model)
    sizes = {name: numbers(layers[name]) for name in in_blocks(layers)}
    return sizes | {name: parameter.numel() for name, parameter in fused_experts(model).items()}


def in_words(sizes: dict[str, int], total: int) -> str:
    """Layers by the ends of their names with their share of `total`: "experts.down_proj (30 %)"."""
    by_ending: dict[str, int] = {}
    for name, size in sizes.items():
        ending = ".".join(name.split(".")[-2:]) if "expert" in name else endings([name])[0]
        by_ending[ending] = by_ending.get(ending, 0) + size
    return ", ".join(f"{ending} ({size / total:.0%})" for ending, size in by_ending.items())
