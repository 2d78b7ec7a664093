"""The bytes that tensors on the meta device would take, moment by moment: an allocator without memory."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ray_peft.vram.pool import BLOCK, Block, Pool


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every storage from its first appearance until nothing holds it, by what it is for."""

    def __init__(self, *, truth: bool) -> None:
        """`truth` answers what the code asks of values, such as whether a mask is true everywhere."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind = "buffers"
        """What new storages are for."""
        self.bytes: Counter[str] = Counter()
        self.now = 0
        self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self.pool: Pool | None = None
        """Where new storages are allocated; None counts their bytes alone."""
        self._truth = truth
        self._known: dict[Any, tuple[Any, ...]] = {}
        """Results of operations by their arguments' shapes: layers repeat, and meta kernels in Python are slower."""
        self._live: dict[int, tuple[str, int, Any]] = {}
        self._blocks: dict[int, tuple[Pool, Block]] = {}

    def own(self, tensor: Tensor, kind: str) -> None:
        """Count the tensor's storage as `kind`, also if it was counted as something else."""
        storage = tensor.untyped_storage()
        key = storage._cdata  # noqa: SLF001 - the storage's address, its only identity on the meta device
        if key in self._live:
            old, size, watch = self._live[key]
            self.bytes[old] -= size
        else:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            watch = weakref.ref(storage, lambda _: self._freed(key))
            self.now += size
            if self.pool is not None and size:
                self._blocks[key] = self.pool, self.pool.allocate(size)
        self._live[key] = (kind, size, watch)
        self.bytes[kind] += size
        if self.now > self.peak:
            self.peak = self.now
            self.at_peak = self.bytes.copy()

    def restart(self) -> None:
        """Forget the peak."""
        self.peak, self.at_peak = self.now, self.bytes.copy()

    def _freed(self, key: int) -> None:
        kind, size, _ = self._live.pop(key)
        self.bytes[kind] -= size
        self.now -= size
        if key in self._blocks:
            pool, block = self._blocks.pop(key)
            pool.free(block)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation on shapes alone and count what it made."""
        if function is torch.ops.aten._local_scalar_dense.default:
            return self._truth if args[0].is_meta else function(*args, **(kwargs or {}))
        if function is torch.ops.aten.add.Tensor and _by_autograd() and _alone(args[0]):
            result = args[0].detach()  # two gradients of one tensor: CUDA's engine adds in place, but not under a mode
        else:
            result = self._result(function, args, kwargs or {})
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._live:  # noqa: SLF001
                self.own(tensor, self.kind)
        return result

    def _result(self, function: Any, args: Any, kwargs: Any) -> Any:
        if not _fresh(function):
            return function(*args, **kwargs)
        key = (function, *map(_shape, args), *((name, _shape(value)) for name, value in kwargs.items()))
        if key not in self._known:
            result = function(*args, **kwargs)
            # _unsafe_view shares its argument's storage, and its schema does not say so
            if isinstance(result, Tensor) and result.untyped_storage()._cdata not in self._live:  # noqa: SLF001
                self._known[key] = (result.shape, result.stride(), result.dtype)
            return result
        shape, stride, dtype = self._known[key]
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


_ENGINE = torch.autograd.graph._engine_run_backward.__code__  # noqa: SLF001


def _by_autograd() -> bool:
    """Whether autograd's engine called the operation itself, and no backward function in Python."""
    frame = sys._getframe(2)  # noqa: SLF001
    while frame.f_code.co_name in ("_fn", "inner") and frame.f_back is not None:  # torch wraps __torch_dispatch__
        frame = frame.f_back
    return frame.f_code is _ENGINE


def _alone(gradient: Tensor) -> bool:
    """Whether only autograd holds a gradient that it adds to: `can_accumulate_inplace` of torch's input_buffer.cpp."""
    storage = gradient.untyped_storage()
    uses = gradient._use_count()  # type: ignore[attr-defined]  # noqa: SLF001 - not in torch's stubs
    of_storage = torch._C._storage_Use_Count(storage._cdata)  # noqa: SLF001
    return uses <= 4 and of_storage <= 2  # the engine's own, and those of this call


@cache
def _fresh(function: Any) -> bool:
    """Whether an operation returns one tensor of its own, and changes none."""
    schema = function._schema  # noqa: SLF001 - torch has no other way to ask
    values = [*schema.arguments, *schema.returns]
    return len(schema.returns) == 1 and all(value.alias_info is None for value in values)


def _shape(value: Any) -> Any:
    """What of an argument decides the shape of the result: all but a tensor's numbers."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(map(_shape, value))
    return type(value), value
