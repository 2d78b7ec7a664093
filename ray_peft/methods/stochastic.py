"""AdamW on bfloat16 weights and moments with stochastic rounding: even the smallest update counts on average.

With rounding to the nearest, an update below 2**-9 of its weight changes nothing, and a second moment that should decay
by 0.1 % a step never decays. Stochastic rounding rounds up with the probability of the remainder, so that both are
right in expectation (Gupta et al. 2015, arXiv:1502.02551; for bfloat16 training: Zamirai et al. 2020,
arXiv:2010.06192). The arithmetic is float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

BUCKET = 2**23
"""Numbers that are updated at a time: enough to keep a GPU busy, few enough that float32 copies stay below 200 MiB."""


class Dice:
    """Random bits from seed, step and place alone: the same on every data-parallel worker and after a resume.

    Of a weight that is spread over workers, each has bits of its own.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._seed = torch.initial_seed()
        self._place = {id(parameter): (place, *_rank(parameter)) for place, parameter in enumerate(parameters)}
        self._generators: dict[torch.device, torch.Generator] = {}

    def generator(self, parameter: Tensor, step: int, part: int = 0) -> torch.Generator:
        """The generator that rounds a weight, or the bucket that begins with it, at one step."""
        generator = self._generators.setdefault(parameter.device, torch.Generator(parameter.device))
        return generator.manual_seed(self.seed(parameter, step, part))

    def seed(self, parameter: Tensor, step: int, part: int = 0) -> int:
        """The 62-bit seed of that generator, for a kernel that draws random bits by itself."""
        place, *rank = self._place[id(parameter)]
        return hash((self._seed, step, place, part, *rank)) & (2**62 - 1)


def _rank(parameter: Any) -> tuple[int, ...]:
    """The worker's place among those that a weight is spread over; () for a weight that it has whole."""
    return tuple(parameter.device_mesh.get_coordinate()) if hasattr(parameter, "device_mesh") else ()


def _own_part(tensor: Any) -> Tensor:
    """What this worker has of a tensor: all of it, unless it is spread over workers."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def rounded(values: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Convert `values` (float32) to `dtype`; to bfloat16 by stochastic rounding, which keeps the mean.

    Overwrites `values`.
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    # A bfloat16 is the upper half of a float32. The sign has a bit of its own, so adding to the bits adds to the
    # magnitude.
    bits = values.view(torch.int32)
    bits += torch.empty_like(bits).random_(0, 2**16, generator=generator)
    bits &= -(2**16)
    return values.to(torch.bfloat16)


@dataclass
class _Bucket:
    """Flat parts of weights with their gradients and moments, all of one dtype and at the same step."""

    step: int
    first: Tensor
    """The weight that the bucket begins with, from its number `begin` on."""
    begin: int
    columns: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] = field(
        default_factory=lambda: ([], [], [], [])
    )
    """Weights, gradients, first moments, second moments."""
    numbers: int = 0


def adamw_step(
    parameters: Sequence[Tensor],
    states: dict[Any, dict[str, Any]],
    group: dict[str, Any],
    dice: Dice,
) -> None:
    """One AdamW step of the parameters that have a gradient (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Args:
        parameters: of one group.
        states: the optimizer's state, filled at a parameter's first step.
        group: lr, betas, eps, weight_decay.
        dice: random bits for the rounding.
    """
    beta1, beta2 = group["betas"]
    for parameter in parameters:  # all that stays comes first, so that it does not lie between what is freed again
        if parameter.grad is not None and not states[parameter]:
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            states[parameter] |= {"step": 0, **zeros}
    for bucket in _buckets(parameters, states):
        weight, grad, first, second = (_joined(column) for column in bucket.columns)
        root = math.sqrt(1 - beta2**bucket.step)
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        size = group["lr"] / (1 - beta1**bucket.step)
        torch.sqrt(second, out=grad).div_(root).add_(group["eps"])
        weight.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(first, grad, value=-size)
        generator = dice.generator(bucket.first, bucket.step, bucket.begin)
        for column, values in zip((0, 2, 3), (weight, first, second), strict=True):
            _write(bucket.columns[column], values, generator)


def _buckets(parameters: Sequence[Tensor], states: dict[Any, dict[str, Any]]) -> Iterator[_Bucket]:
    open_buckets: dict[tuple[int, torch.dtype, torch.device], _Bucket] = {}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if not parameter.is_contiguous():
            raise ValueError(
                f"a weight of shape {tuple(parameter.shape)} is not contiguous, so it cannot be updated flat"
            )
        state = states[parameter]
        state["step"] += 1
        tensors = [
            _own_part(tensor) for tensor in (parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        ]
        flat = [tensor.view(-1) if tensor.is_contiguous() else tensor.reshape(-1) for tensor in tensors]
        key = (state["step"], parameter.dtype, parameter.device)
        for begin in range(0, tensors[0].numel(), BUCKET):
            if key not in open_buckets:
                open_buckets[key] = _Bucket(state["step"], parameter, begin)
            bucket = open_buckets[key]
            for column, tensor in zip(bucket.columns, flat, strict=True):
                column.append(tensor[begin : begin + BUCKET])
            bucket.numbers += bucket.columns[0][-1].numel()
            if bucket.numbers >= BUCKET:
                yield open_buckets.pop(key)
    yield from open_buckets.values()


def _joined(parts: list[Tensor]) -> Tensor:
    """One float32 tensor with copies of all parts."""
    return torch.cat(parts).float() if len(parts) > 1 else parts[0].to(torch.float32, copy=True)


def _write(parts: list[Tensor], values: Tensor, generator: torch.Generator) -> None:
    new = rounded(values, parts[0].dtype, generator)
    torch._foreach_copy_(parts, list(torch.split(new, [part.numel() for part in parts])))


class StochasticAdamW(Optimizer):
    """torch's AdamW with moments in the dtype of the weights; both are rounded stochastically if it is bfloat16."""

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float = 1e-8
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._dice = Dice(parameter for group in self.param_groups for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is used here
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            adamw_step(group["params"], self.state, group, self._dice)
