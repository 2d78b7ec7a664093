"""What one of several workers holds of a model that is spread over them (resources.strategy: fsdp)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ray_peft.reach.blocks import blocks
from ray_peft.vram.predict import GATHERED, PASS, RESIDENT, UPDATE

if TYPE_CHECKING:
    from torch import nn

BLOCK, REST, ALL = "largest block", "outside of blocks", "all"
"""Kinds of bytes of a model's weights: two that are gathered at once, and their sum over the model."""


def units(model: nn.Module) -> Counter[str]:
    """Bytes of the weights of the largest block, of those outside of the blocks, and of all, each counted once."""

    def num_bytes(part: nn.Module) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in part.parameters())

    sizes, everything = [num_bytes(block) for block in blocks(model)], num_bytes(model)
    return Counter({BLOCK: max(sizes), REST: everything - sum(sizes), ALL: everything})


def spread(step: Counter[str], sizes: Counter[str], workers: int, *, trains_base: bool) -> Counter[str]:
    """Bytes by kind at the peak of a step on one of `workers`, from those of a worker that holds all.

    Weights, and where the base is trained gradients and moments, are divided by the workers: stage 3 of ZeRO
    (Rajbhandari et al. 2020, arXiv:1910.02054, section 5.3). Beside them lies what FSDP2 gathers and frees
    (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py of torch 2.13): what is outside of the blocks, for the
    whole pass; the block that computes, the next one, and the buffer from which that is copied; of a trained base, the
    gradients of what is outside and of a block, and the copy that is added up. Constants of quantisation and adapters
    are whole on every worker. Not measured on a GPU.

    Args:
        step: of one worker alone, with PASS and UPDATE.
        sizes: what `units` says of the model.
        workers: at least 2.
        trains_base: the base itself is trained.
    """
    divided = ("weights", "gradients", "optimizer") if trains_base else ("weights",)
    resident = Counter({kind: size for kind, size in step.items() if kind in RESIDENT})
    for kind in divided:
        resident[kind] = -(-resident[kind] // workers)
    gathered = sizes[REST] + 3 * sizes[BLOCK]
    if trains_base:
        gathered += sizes[REST] + 2 * sizes[BLOCK]
    update = step[UPDATE] // workers if trains_base else step[UPDATE]
    while_passing = resident + Counter({GATHERED: gathered, "buffers": step[PASS]})
    while_updating = resident + Counter(buffers=update)
    peak = max(while_passing, while_updating, key=lambda part: sum(part.values()))
    peak[PASS], peak[UPDATE] = step[PASS], update
    return peak


def evaluated(scored: Counter[str], sizes: Counter[str], workers: int) -> Counter[str]:
    """The same of an evaluation: bytes of the model on one worker, of what it gathers, and those that scoring adds.

    Args:
        scored: of one worker alone, with `model`.
        sizes: what `units` says of the model.
        workers: at least 2.
    """
    own = scored["model"] - sizes[ALL] + -(-sizes[ALL] // workers)
    return Counter({**scored, "model": own, GATHERED: sizes[REST] + 3 * sizes[BLOCK]})
