"""What training and evaluation do when a GPU's memory runs out: recognise it, free memory, go on with half the rows."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_LIBRARIES = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch says so with a class of its own, the libraries below it with a message."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(name in str(error) for name in _LIBRARIES)


def out_of_memory(text: str) -> RuntimeError:
    """The error of a worker whose own memory may suffice, but must end with those that ran out."""
    import torch

    return torch.OutOfMemoryError(text)


def free_memory(device: str) -> None:
    """Give freed memory back to the device. Call it after the `except` block: its error keeps tensors alive."""
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def leave_out_imports() -> None:
    """Leave what a process has imported out of later collections of garbage; its first call does it.

    Torch, transformers, diffusers and Ray make 700,000 objects that never go, and every `free_memory` walked over all
    of them: 0.6 s of CPU time. Call it before weights are loaded. What was there before is freed by its last reference
    only, so this is for processes that do nothing but trials.
    """
    if not gc.get_freeze_count():
        gc.freeze()


def answers(device: str) -> bool:
    """True if the device still works in this process, or was never used in it.

    A kernel that failed poisons the CUDA context for good: every later call fails.
    """
    import torch

    if device == "cpu" or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return True
    try:
        torch.cuda.synchronize()
        return bool((torch.ones(1, device="cuda") + 1).item() == 2)
    except RuntimeError:  # what torch raises for CUDA errors, torch.AcceleratorError included
        return False


def divisor(number: int, most: int) -> int:
    """The greatest divisor of `number` up to `most`: as many rows in every pass."""
    return next(rows for rows in range(most, 0, -1) if number % rows == 0)


def in_parts(
    items: Sequence[ItemT],
    size: int,
    device: str,
    work: Callable[[Sequence[ItemT]], list[ResultT]],
    *,
    repeats: bool = True,
) -> tuple[list[ResultT], int]:
    """Apply `work` to at most `size` items at a time, in order. Where memory runs out, go on with half as many.

    Args:
        items: all of them.
        size: at first.
        device: of the model.
        work: what is done with some items.
        repeats: False where other workers wait inside of `work` for what this one has.

    Returns:
        The results, and the size at the end.

    Raises:
        torch.OutOfMemoryError: a single item does not fit, or nothing is repeated.
    """
    results: list[ResultT] = []
    begin = 0
    while begin < len(items):
        part = items[begin : begin + size]
        try:
            results += work(part)
            begin += len(part)
            continue
        except RuntimeError as error:
            if not repeats or len(part) == 1 or not is_out_of_memory(error):
                raise
        free_memory(device)
        size = len(part) // 2
        logger.warning("%d at a time ran out of memory; going on with %d", len(part), size)
    return results, size
