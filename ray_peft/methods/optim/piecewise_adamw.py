"""AdamW over weights in pieces of a bounded size, with moments in the weights' dtype or in 8 bits, rounded as asked.

What optimizers of whole models share: those that do more for some groups of weights (GaLore, Muon) extend it.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ray_peft.methods import fused, moments
from ray_peft.methods.moments import Piece
from ray_peft.methods.stochastic import BUCKET, Dice, rounded


class PiecewiseAdamW(Optimizer):
    """AdamW as transformers had it: `eps` without bias correction, and weight decay after the update.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """

    param_groups: list[dict[str, Any]]
    at_a_time = BUCKET
    """How many numbers are updated at a time: more is faster."""

    def __init__(
        self,
        groups: Iterable[dict[str, object]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        stochastic: bool = False,
        eight_bit: bool = False,
    ) -> None:
        """Set up the optimizer.

        Args:
            groups: of weights.
            lr: learning rate.
            betas: decay rates of the moments.
            eps: added to the root of the second moment, without bias correction.
            stochastic: round stochastically what is stored in bfloat16; the arithmetic is then float32.
            eight_bit: store moments in 8 bits; the arithmetic is then float32.
        """
        super().__init__(list(groups), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._stochastic, self._eight_bit = stochastic, eight_bit
        self._dice = Dice(parameter for group in self.param_groups for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is used here
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            self._step_group(group, [parameter for parameter in group["params"] if self._has_gradient(parameter)])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, each tensor in the dtype that it was saved in, on its weight's device."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                saved = state_dict["state"][number]
                self.state[parameter] = {name: _moved(value, parameter.device) for name, value in saved.items()}

    def _has_gradient(self, parameter: Tensor) -> bool:
        return parameter.grad is not None

    def _gradient(self, parameter: Tensor) -> Tensor:
        """The step's gradient of a weight, on its device."""
        assert parameter.grad is not None
        return parameter.grad

    def _piece_of_gradient(self, parameter: Tensor, begin: int, end: int) -> Tensor:
        """Some of the numbers of a gradient that is not projected."""
        return self._gradient(parameter).reshape(-1)[begin:end]

    def _step_group(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            state["step"] = int(state.get("step", 0)) + 1
        self._update_group(group, parameters)

    def _update_group(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        """Update weights whose steps are counted already."""
        self._make_moments(parameters, [parameter.shape for parameter in parameters])
        for pieces in self._pieces(parameters):
            self._update_pieces(group, pieces)

    def _make_moments(self, parameters: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
        """Make those that are not there yet, before the tensors of an update, between which they would lie."""
        for parameter, shape in zip(parameters, shapes, strict=True):
            state = self.state[parameter]
            if moments.NAMES[0] not in state:
                moments.make(state, parameter.new_empty(()).expand(shape), eight_bit=self._eight_bit)

    def _batches(self, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Weights of one shape that are at the same step, at most `at_a_time` numbers in a batch."""
        by_kind: dict[Any, list[Tensor]] = {}
        for parameter in parameters:
            key = (parameter.shape, parameter.dtype, parameter.device, self.state[parameter]["step"])
            by_kind.setdefault(key, []).append(parameter)
        for weights in by_kind.values():
            count = max(1, self.at_a_time // weights[0].numel())
            for begin in range(0, len(weights), count):
                yield weights[begin : begin + count]

    def _update_pieces_fused(self, group: dict[str, Any], parts: list[tuple[Tensor, int, int]]) -> None:
        for parameter, begin, end in parts:
            piece = Piece(self.state[parameter], begin, end)
            grad = self._piece_of_gradient(parameter, begin, end)
            weight = _flat(parameter, begin, end)
            settings: dict[str, Any] = {
                "betas": group["betas"],
                "eps": group["eps"],
                "size": self._size(group, piece.state["step"]),
                "decay": group["lr"] * group["weight_decay"],
                "seed": self._seed(parameter, begin),
            }
            self._with_moments(piece, partial(fused.adamw, weight, grad, **settings))

    def _with_moments(self, piece: Piece, work: Callable[[list[Tensor]], None]) -> None:
        """Let `work` change both moments of a piece, in place or as float32 copies."""
        stored = moments.in_place(piece)
        if stored is not None:
            work(stored)
            return
        copies = moments.read([piece], torch.float32)
        work(copies)
        moments.write([piece], copies, lambda values, dtype: values.to(dtype))

    def _seed(self, parameter: Tensor, part: int) -> int:
        return self._dice.seed(parameter, self.state[parameter]["step"], part)

    def _size(self, group: dict[str, Any], step: int) -> float:
        """The factor on the moments' quotient: the learning rate, corrected for moments that began at zero."""
        beta1, beta2 = group["betas"]
        size: float = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        return size

    def _pieces(self, parameters: Sequence[Tensor]) -> Iterator[list[tuple[Tensor, int, int]]]:
        """Lists of flat parts of weights (weight, begin, end), each at one step and of about `at_a_time` numbers."""
        open_pieces: dict[Any, list[tuple[Tensor, int, int]]] = {}
        for parameter in parameters:
            if not parameter.is_contiguous():
                raise ValueError(
                    f"a weight of shape {tuple(parameter.shape)} is not contiguous, so it cannot be updated flat"
                )
            state = self.state[parameter]
            kind = state[moments.NAMES[0]].dtype
            key = (state["step"], parameter.dtype, parameter.device, kind)
            for begin in range(0, parameter.numel(), self.at_a_time):
                end = min(begin + self.at_a_time, parameter.numel())
                pieces = open_pieces.setdefault(key, [])
                pieces.append((parameter, begin, end))
                if sum(last - first for _, first, last in pieces) >= self.at_a_time:
                    yield open_pieces.pop(key)
        yield from open_pieces.values()

    def _update_pieces(self, group: dict[str, Any], parts: list[tuple[Tensor, int, int]]) -> None:
        first = parts[0][0]
        if self._stochastic and fused.serves(first):
            self._update_pieces_fused(group, parts)
            return
        dtype = self._arithmetic(first)
        pieces = [Piece(self.state[parameter], begin, end) for parameter, begin, end in parts]
        grad = _joined([self._piece_of_gradient(*part).to(dtype) for part in parts])
        changed, direction = self._direction(group, pieces, grad, dtype)
        del grad
        weight = _joined([_flat(*part) for part in parts]).to(dtype, copy=True)
        self._move(group, weight, direction, pieces[0].state["step"])
        del direction
        self._store(parts, weight, pieces, changed)

    def _arithmetic(self, parameter: Tensor) -> torch.dtype:
        return torch.float32 if self._stochastic or self._eight_bit else parameter.dtype

    def _direction(
        self, group: dict[str, Any], pieces: list[Piece], grad: Tensor, dtype: torch.dtype
    ) -> tuple[list[Tensor], Tensor]:
        """The updated moments, flat, and the first divided by the root of the second."""
        beta1, beta2 = group["betas"]
        first, second = moments.read(pieces, dtype)
        first.mul_(beta1).add_(grad, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = second.sqrt().add_(group["eps"])
        direction = torch.div(first, root, out=root)
        return [first, second], direction

    def _move(self, group: dict[str, Any], weight: Tensor, direction: Tensor, step: int) -> None:
        weight.add_(direction, alpha=-self._size(group, step))
        if group["weight_decay"] > 0:
            weight.add_(weight, alpha=-group["lr"] * group["weight_decay"])

    def _store(
        self, parts: list[tuple[Tensor, int, int]], weight: Tensor, pieces: list[Piece], changed: list[Tensor]
    ) -> None:
        """Store the updated weights and moments, all flat; moments are rounded in the way that weights are."""
        first, begin, _ = parts[0]
        generator = self._dice.generator(first, pieces[0].state["step"], begin) if self._stochastic else None

        def stored(values: Tensor, dtype: torch.dtype) -> Tensor:
            return rounded(values, dtype, generator) if self._stochastic else values.to(dtype)

        targets = [_flat(*part) for part in parts]
        torch._foreach_copy_(
            targets, list(torch.split(stored(weight, first.dtype), [len(target) for target in targets]))
        )
        moments.write(pieces, changed, stored)


class Layerwise(PiecewiseAdamW):
    """Updates a weight as soon as its gradient is computed, then frees the gradient; `step` has nothing left to do."""

    worst: Tensor | float = 0.0
    """Zero, or NaN once a gradient was not finite."""

    def __init__(self, groups: Iterable[dict[str, object]], **settings: Any) -> None:
        """As the optimizer that it is mixed into."""
        super().__init__(groups, **settings)
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(_stepper(weakref.ref(self), index))


def _stepper(optimizer: weakref.ref[Layerwise], index: int) -> Any:
    # Python's garbage collector does not follow the hooks of a tensor. A hook with a reference to the optimizer would
    # keep it and all weights alive until the process ends.
    def step_one(parameter: Tensor) -> None:
        self = optimizer()
        if self is None:  # a later stage trains with another optimizer
            return
        assert parameter.grad is not None
        # Zero times a sum is zero, or NaN where a number is not finite: nothing waits for the GPU.
        self.worst = self.worst + parameter.grad.sum(dtype=torch.float32) * 0
        with torch.no_grad():
            self._step_group(self.param_groups[index], [parameter])
        parameter.grad = None

    return step_one


def _flat(parameter: Tensor, begin: int, end: int) -> Tensor:
    """Some of a weight's numbers, in place where it is contiguous."""
    return parameter.detach().view(-1)[begin:end]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape along a new first axis; a single one as a view."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].detach()[None]


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def listed(value: Any) -> list[Tensor]:
    """A tensor, or several of them, as a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    return [_moved(part, device) for part in value] if isinstance(value, list | tuple) else value
