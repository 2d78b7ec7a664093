"""LoRA adapters of several members on one frozen base: their memory, and what they add to its layers' outputs.

A slot holds one member's adapter, as PEFT's A (rank, in) and transposed B (rank, out) of every layer, one after the
other in one row of memory; a member of a smaller rank, or of fewer layers, leaves zeros, whose gradients are zero. So
the parameter of a member is its row, and its optimizer and its gradient's norm are the plain ones. Passes hold lanes,
each of one slot. No value of one slot reaches another, NaN included.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ray_peft.engine.keyed_dropout import keyed_dropout, layer_number

ALIGNED = 64
"""Each matrix begins at a multiple of this many numbers: the fast kernels of a GPU need an alignment of 16 bytes."""


@dataclass(frozen=True)
class Matrices:
    """One layer's A and B of all slots: views of their memory."""

    down: Tensor
    """A, (slots, rank, in)."""
    up: Tensor
    """B transposed, (slots, rank, out)."""


@dataclass(frozen=True)
class Sizes:
    """Features of a layer."""

    inputs: int
    outputs: int


@dataclass(frozen=True)
class Piece:
    """Where a matrix of a member lies in its slot."""

    begin: int
    rank: int
    width: int
    turned: bool
    """True for B, which PEFT holds as (out, rank)."""

    def cut(self, row: Tensor) -> Tensor:
        """A copy of the matrix, as PEFT holds it, from a slot's memory (1, numbers)."""
        return (self._of(row).T if self.turned else self._of(row)).clone(memory_format=torch.contiguous_format)

    def put(self, row: Tensor, matrix: Tensor) -> None:
        """Write the matrix, as PEFT holds it, into a slot's memory (1, numbers)."""
        self._of(row).copy_(matrix.T if self.turned else matrix)

    def _of(self, row: Tensor) -> Tensor:
        return row[0, self.begin : self.begin + self.rank * self.width].view(self.rank, self.width)


class Slots:
    """The adapters of all members on one base."""

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        *,
        slots: int,
        rank: int,
        dtype: torch.dtype,
        computed: torch.dtype,
    ) -> None:
        """Take memory, and watch the layers.

        Args:
            model: the base, without adapters.
            layers: names of all layers that any member targets: linear ones, in 4 bits or not, and Conv1D.
            slots: members at a time.
            rank: the largest of all members.
            dtype: holds adapters and gradients.
            computed: the dtype of the adapters' products.
        """
        self._watched = {name: model.get_submodule(name) for name in layers}
        self.sizes = {name: sizes(module) for name, module in self._watched.items()}
        self.rank = rank
        self._begins: dict[str, tuple[int, int]] = {}
        """Where A and B of each layer begin."""
        numbers = 0
        for name, size in self.sizes.items():
            self._begins[name] = (numbers, numbers + rank * _aligned(size.inputs))
            numbers = self._begins[name][1] + rank * _aligned(size.outputs)
        device = cast(Tensor, next(iter(self._watched.values())).weight).device
        self.weights = torch.zeros(slots, numbers, dtype=dtype, device=device)
        self.gradients = torch.zeros_like(self.weights)
        self._cast_weights = self.weights if computed == dtype else self.weights.to(computed)
        """The weights in the dtype of the products, written at the begin of each pass."""
        self.scales = torch.zeros(slots, device=device)
        """alpha / rank."""
        self._shares = torch.zeros(slots, device=device)
        """Of an adapter's inputs, the share that is dropped in training."""
        self._gradient_matrices = self._matrices(self.gradients)
        self._weight_matrices = self._matrices(self._cast_weights)
        self._lanes: Tensor | None = None
        self._keys: Tensor | None = None
        """Of the tokens of the pass that runs, if adapters drop some of their inputs (keyed_dropout.py)."""
        self._anchor = torch.zeros((), device=device, requires_grad=True)  # so that the layers' outputs take gradients
        self._hooks = [module.register_forward_hook(self._hook(name)) for name, module in self._watched.items()]

    def __len__(self) -> int:
        """How many members at a time."""
        return len(self.weights)

    def remove(self) -> None:
        """Leave the layers alone from now on."""
        for hook in self._hooks:
            hook.remove()

    def fill(self, slot: int, adapted: nn.Module, scale: float, dropout: float = 0.0) -> list[Piece]:
        """Copy a member's adapter into a slot; its gradients are zero. Returns where its matrices lie there.

        Args:
            slot: whose content is lost.
            adapted: the base in PEFT's wrapper with one LoRA adapter.
            scale: alpha / rank.
            dropout: the share of the adapter's inputs that is dropped in training.

        Raises:
            KeyError: it has a layer that these slots have not.
        """
        self.clear(slot)
        row, pieces = self.weights[slot : slot + 1], []
        for name, down, up in adapters(adapted):
            begins = self._begins[name]
            pieces.append(Piece(begins[0], len(down), down.shape[1], turned=False))
            pieces.append(Piece(begins[1], len(down), up.shape[0], turned=True))
            pieces[-2].put(row, down.detach())
            pieces[-1].put(row, up.detach())
        self.scales[slot], self._shares[slot] = scale, dropout
        return pieces

    def fill_again(self, slot: int, row: Tensor, scale: float, dropout: float = 0.0) -> None:
        """Copy what another member's slot held (1, numbers) into a slot; other arguments are those of `fill`."""
        self.clear(slot)
        self.weights[slot : slot + 1] = row
        self.scales[slot], self._shares[slot] = scale, dropout

    def read(self, slot: int, adapted: nn.Module) -> None:
        """Copy a slot into the adapter of `adapted`, which is one of the same rank and layers as filled the slot."""
        row = self.weights[slot : slot + 1]
        with torch.no_grad():
            for name, down, up in adapters(adapted):
                begins = self._begins[name]
                down.copy_(Piece(begins[0], len(down), down.shape[1], turned=False).cut(row))
                up.copy_(Piece(begins[1], len(down), up.shape[0], turned=True).cut(row))

    def is_finite(self, slot: int) -> bool:
        """Whether all numbers of a slot are finite."""
        return bool(torch.isfinite(self.weights[slot]).all())

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        self.weights[slot].zero_()
        self.gradients[slot].zero_()
        self.scales[slot] = self._shares[slot] = 0.0

    def member(self, slot: int) -> nn.Module:
        """A module whose only parameter (1, numbers) is the slot, with its gradient; pads stay zero in any AdamW."""
        holder = nn.Module()
        holder.adapter = nn.Parameter(self.weights[slot : slot + 1])
        holder.adapter.grad = self.gradients[slot : slot + 1]
        return holder

    def begin(self, lanes: Tensor, keys: Tensor | None = None) -> None:
        """Begin a pass; what it is given must stay as it is until the pass has gone backward.

        Args:
            lanes: (lanes,) int64, the slot of each, or (0,) where there is one lane of each slot in order, which costs
                less. The pass's activations are (lanes * tokens, numbers) in this order, or have any axes that flatten
                to it.
            keys: (lanes, tokens) int64, of each token; None for a pass that drops nothing.
        """
        self._lanes, self._keys = lanes, keys
        if self._cast_weights is not self.weights:
            self._cast_weights.copy_(self.weights)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Inside, the layers compute the base without adapters."""
        lanes, self._lanes = self._lanes, None
        try:
            yield
        finally:
            self._lanes = lanes

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if self._lanes is None:
                return None
            weights, gradients = self._weight_matrices[name], self._gradient_matrices[name]
            x = inputs[0] if self._keys is None else self._dropped(inputs[0], self._keys, name)
            return _Added.apply(x, output, self._anchor, self._lanes, self.scales, weights, gradients)  # type: ignore[no-any-return, no-untyped-call]

        return add

    def _dropped(self, x: Tensor, keys: Tensor, name: str) -> Tensor:
        """The adapters' input of a layer, as each drops it in a trial alone."""
        assert self._lanes is not None
        shares, layer = _of_lanes(self._shares, self._lanes)[:, None], layer_number(name)
        tokens = x.reshape(*keys.shape, x.shape[-1])
        return keyed_dropout(tokens, shares, keys, layer, dtype=self._cast_weights.dtype).view(x.shape)

    def _matrices(self, memory: Tensor) -> dict[str, Matrices]:
        def view(begin: int, width: int) -> Tensor:
            return memory[:, begin : begin + self.rank * width].view(len(memory), self.rank, width)

        return {
            name: Matrices(view(down, size.inputs), view(up, size.outputs))
            for (name, size), (down, up) in zip(self.sizes.items(), self._begins.values(), strict=True)
        }


class _Added(torch.autograd.Function):
    """output + scale * B A input, by lanes. The gradients of A and B go straight into their memory."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, output: Tensor, _: Tensor, lanes: Tensor, scales: Tensor, weights: Matrices,
        gradients: Matrices,
    ) -> Tensor:  # fmt: skip
        scale = _of_lanes(scales, lanes)[:, None, None]
        down = _of_lanes(weights.down, lanes)
        rows = x.reshape(len(down), -1, x.shape[-1]).to(down.dtype)
        thin = (torch.bmm(rows, down.transpose(1, 2)) * scale).to(down.dtype)
        ctx.save_for_backward(x, thin, lanes, scale)
        ctx.weights, ctx.gradients = weights, gradients
        up = _of_lanes(weights.up, lanes)
        if output.dtype == down.dtype:
            return torch.baddbmm(output.reshape(len(down), -1, output.shape[-1]), thin, up).view(output.shape)
        return (output + torch.bmm(thin, up).view(output.shape)).to(output.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, thin, lanes, scale = ctx.saved_tensors
        down, up = _of_lanes(ctx.weights.down, lanes), _of_lanes(ctx.weights.up, lanes)
        rows = x.reshape(len(down), -1, x.shape[-1]).to(down.dtype)
        of_output = gradient.reshape(len(down), -1, gradient.shape[-1]).to(down.dtype)
        of_thin = (torch.bmm(of_output, up.transpose(1, 2)) * scale).to(down.dtype)
        _add_by_lanes(ctx.gradients.down, lanes, torch.bmm(of_thin.transpose(1, 2), rows))
        _add_by_lanes(ctx.gradients.up, lanes, torch.bmm(thin.transpose(1, 2), of_output))
        of_input = torch.bmm(of_thin, down).view(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        return of_input, gradient, None, None, None, None, None


def _of_lanes(slots: Tensor, lanes: Tensor) -> Tensor:
    """The values of each lane's slot."""
    return slots.index_select(0, lanes) if len(lanes) else slots


def _add_by_lanes(slots: Tensor, lanes: Tensor, values: Tensor) -> None:
    """Add each lane's values to those of its slot."""
    if len(lanes):
        slots.index_add_(0, lanes, values.to(slots.dtype))
    else:
        slots.add_(values)


def sizes(module: nn.Module) -> Sizes:
    """The features of a linear layer, in 4 bits or not, or of a Conv1D.

    Raises:
        TypeError: it is neither.
    """
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return Sizes(module.in_features, module.out_features)
    if isinstance(module, Conv1D):
        return Sizes(module.nx, module.nf)
    raise TypeError(f"{type(module).__name__} is no linear layer")


def adapters(adapted: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Layer, A (rank, in) and B (out, rank) of the only LoRA adapter of a model in PEFT's wrapper.

    Raises:
        TypeError: an adapter is of another kind than two matrices.
    """
    from peft.tuners.lora import LoraLayer

    base = adapted.get_base_model()  # type: ignore[operator]
    for name, module in base.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        sizes(module.get_base_layer())
        ((_, down),), ((_, up),) = module.lora_A.items(), module.lora_B.items()
        yield name, cast(Tensor, down.weight), cast(Tensor, up.weight)


def _aligned(numbers: int) -> int:
    return math.ceil(numbers / ALIGNED) * ALIGNED
