"""Data-parallel workers: which one this is, and sums over all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray_peft.engine.contract import Share
from ray_peft.engine.shards import is_spread

if TYPE_CHECKING:
    from torch import Tensor, nn


def this_worker() -> Share:
    """This worker's rank, and how many there are."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Share()
    return Share(torch.distributed.get_rank(), torch.distributed.get_world_size())


def add_up_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum the gradients over the workers, each of which divided by the whole step's rows or tokens.

    A worker without rows in the step has no gradient, which counts as zero. Gradients of weights that are spread over
    the workers were added up in the backward pass.
    """
    import torch

    parameters = [parameter for parameter in parameters if not is_spread(parameter)]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        assert parameter.grad is not None
        by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        torch.distributed.all_reduce(flat)
        totals = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, total in zip(gradients, totals, strict=True):
            gradient.copy_(total.view_as(gradient))


def add_up(value: Tensor) -> None:
    """Sum a tensor over the workers, in place."""
    import torch

    torch.distributed.all_reduce(value)


def from_first(value: bool, device: str) -> bool:
    """The first worker's value, on all workers."""
    import torch

    values = torch.tensor([value], dtype=torch.int32, device=device)
    torch.distributed.broadcast(values, src=0)
    return bool(values)


def from_all(value: object) -> list[object]:
    """Every worker's value, in the order of ranks; small ones, which are pickled."""
    import torch

    values: list[object] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


class Agreement:
    """What all workers agree on in each round, without waiting for a GPU; all of them must make it, and ask it."""

    def __init__(self) -> None:
        """Connect the workers' processes, if their own connection is for tensors of GPUs alone, as NCCL's is."""
        import torch

        by_cpu = torch.distributed.get_backend() == "gloo"
        self._group: Any = None if by_cpu else torch.distributed.new_group(backend="gloo")

    def least(self, number: int) -> int:
        """The least of the workers' numbers."""
        import torch

        value = torch.tensor(number)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MIN, group=self._group)
        return int(value)
