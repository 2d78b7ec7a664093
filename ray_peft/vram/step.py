"""One optimizer step on the meta device: the real model, method and optimizer, on shapes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ray_peft.methods.base import Stage
from ray_peft.methods.galore_adamw import BASIS
from ray_peft.methods.optimizers import keeps_gradient
from ray_peft.vram.pool import Pool
from ray_peft.vram.predict import PASS, UPDATE
from ray_peft.vram.stand_ins import Autocast
from ray_peft.vram.tape import Tape


@dataclass(frozen=True)
class Conditions:
    """What decides a trial's memory beside model, method and rows."""

    autocast: bool
    """Matrix products are in bfloat16."""
    accumulates: bool
    """A step takes several passes, so that gradients are there while activations are."""
    padded: bool
    """Rows of a pass differ in length, so that attention needs a mask."""
    shares_masks: bool = False
    """All layers of a kind share one mask of numbers."""


def components(model: nn.Module, stage: Stage, loss: Callable[[], Tensor], conditions: Conditions) -> Counter[str]:
    """Bytes by kind at the peak of a step in the steady state.

    Args:
        model: on the meta device, attached to `stage`, in training mode.
        stage: makes the optimizer.
        loss: the forward pass; called twice, and its tensors must be on the meta device.
        conditions: the conditions.

    Returns:
        weights, quantization, adapters, gradients, optimizer, projectors, activations (what the forward pass keeps for
        the backward pass), buffers (all else at the peak: logits tiles, recomputed layers, dequantised weights). And,
        beside the peak, PASS and UPDATE.
    """
    tape = Tape(truth=not conditions.padded)
    own_model(tape, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(_own_gradient(tape))  # type: ignore[no-untyped-call]
    optimizer = stage.optimizer(model)  # a layer-wise one frees each gradient in a hook of its own
    for parameter in trained:
        if conditions.accumulates and parameter.requires_grad and not keeps_gradient(optimizer, parameter):
            parameter.grad = torch.empty_like(parameter)
            tape.own(parameter.grad, "gradients")
    with tape:
        tape.pool = of_pass = Pool()
        saved_bytes = _pass(tape, loss, conditions)
        if _state(optimizer):  # made in the backward pass, so only a second pass has all of it
            _own_state(tape, optimizer)
            tape.pool = of_pass = Pool()
            saved_bytes = _pass(tape, loss, conditions)
        passes = tape.at_peak
        tape.kind = "update"
        tape.restart()
        for _ in range(2):  # the first step makes the state
            tape.pool = of_update = Pool()
            optimizer.step()
    update = tape.at_peak
    early = {kind: tape.bytes[kind] for kind in _STATE}
    _own_state(tape, optimizer)
    state = {kind: tape.bytes[kind] for kind in _STATE}
    activations = min(saved_bytes, passes["buffers"])
    passes = passes + Counter({"activations": activations, "buffers": -activations})
    for kind, size in state.items():
        passes[kind] += size - early[kind]
        part = min(size - early[kind], update["update"])
        update += Counter({kind: part, "update": -part})
    update["buffers"] += update.pop("update", 0)
    peak = max(passes, update, key=lambda sizes: sum(sizes.values()))
    peak[PASS], peak[UPDATE] = of_pass.reserved, of_update.reserved
    return peak


_STATE = ("optimizer", "projectors")


def own_model(tape: Tape, model: nn.Module) -> None:
    """Count what a model holds."""
    adapted = any(not parameter.requires_grad for parameter in model.parameters())
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            tape.own(parameter, "adapters" if adapted and parameter.requires_grad else "weights")
        for name, buffer in module.named_buffers(recurse=False):
            tape.own(buffer, "quantization" if name.startswith("scales") else "weights")


def _own_gradient(tape: Tape) -> Callable[[Tensor], None]:
    def own(parameter: Tensor) -> None:
        if parameter.grad is not None:
            tape.own(parameter.grad, "gradients")

    return own


def _pass(tape: Tape, loss: Callable[[], Tensor], conditions: Conditions) -> int:
    """Run forward and backward; returns the bytes that are stored between the two."""
    tape.restart()
    autocast = Autocast(torch.bfloat16 if conditions.autocast else None, shares_masks=conditions.shares_masks)
    with autocast:
        value = loss()
    autocast.forget()
    saved_bytes = tape.bytes["buffers"]
    torch.autograd.backward(value)
    return saved_bytes


def _own_state(tape: Tape, optimizer: Optimizer) -> None:
    for kind, tensor in _state(optimizer):
        tape.own(tensor, kind)


def _state(optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """The tensors that an optimizer keeps, by kind."""
    tensors: list[tuple[str, Tensor]] = []
    for state in optimizer.state.values():
        for name, value in state.items():
            parts = value if isinstance(value, list | tuple) else [value]
            kind = "projectors" if name == BASIS else "optimizer"
            tensors += [(kind, part) for part in parts if isinstance(part, Tensor)]
    return tensors
