"""What a stage writes, compared with the space that is free, before its first step."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ray_peft.engine.checkpoint import STATE_FILE
from ray_peft.errors import StorageError
from ray_peft.foundation.units import GIB

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

logger = logging.getLogger(__name__)

AT_ONCE = 3
"""Checkpoints that stand beside each other at most: two are kept while the next one is written."""
SAVED_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def state_bytes(parameters: Iterable[Tensor], optimizer: Optimizer) -> int:
    """Bytes of a checkpoint, at least: the trained parameters, and what their optimizer keeps if that is known."""
    sizes = [(parameter.numel(), parameter.nbytes) for parameter in parameters]
    kind = type(optimizer).__name__
    own = sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if hasattr(value, "nbytes")
    )
    if not own and kind in ("Adam", "AdamW"):  # two moments like the parameters
        own = 2 * sum(nbytes for _, nbytes in sizes)
    elif not own and kind in ("AdamW8bit", "PagedAdamW8bit"):  # two moments of a byte each
        own = 2 * sum(count for count, _ in sizes)
    trained: int = sum(nbytes for _, nbytes in sizes)
    return int(own + trained)


def check(folder: Path, weights: int, state: int, *, steps: int, every: int | str | None) -> None:
    """Compare what a stage writes with what is free.

    Checkpoints that are due by time may never be written, so they are a warning where they would not fit.

    Args:
        folder: of the stage; the trial's own is above it.
        weights: bytes of what is saved at the end.
        state: bytes of a checkpoint.
        steps: of the stage.
        every: `train.checkpoint_every`.

    Raises:
        StorageError: it does not fit.
    """
    free = shutil.disk_usage(_existing(folder)).free
    written = sum(file.stat().st_size for file in folder.glob(f"checkpoint-*/{STATE_FILE}"))
    due = min((steps - 1) // every, AT_ONCE) if isinstance(every, int) else 0
    needed = weights + max(0, due * state - written)
    if needed > free:
        raise StorageError(
            f"{folder.parent}: a trial that writes {_size(needed)} there does not start, since {_size(free)} are free: "
            f"weights of {_size(weights)} and {due} checkpoints of {_size(state)}. Free some space, use another --out, "
            "or write fewer checkpoints (train.checkpoint_every)"
        )
    if isinstance(every, str) and weights + AT_ONCE * state - written > free:
        logger.warning("%s: %d checkpoints of %s do not fit into the %s that are free",
                       folder.parent, AT_ONCE, _size(state), _size(free))  # fmt: skip


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 100 else f"{num_bytes / 2**20:.2f} MiB"
