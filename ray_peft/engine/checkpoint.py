"""Checkpoints of a stage: written aside, moved whole, two kept, and the last whole one found again.

A checkpoint is one file, as torch writes it: a zip archive whose directory comes last and has a checksum of each part.
So the file itself proves that it is whole. torch does not look at the checksums; `read_last` does.
"""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from ray_peft.engine.shards import is_spread, part_of
from ray_peft.foundation.whole import replaced_folder

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"


def write(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `checkpoint-<step>` into `folder` in one move; all but it and the one before it go after that."""
    import torch

    target = folder / f"checkpoint-{step}"
    with replaced_folder(target) as partial, (partial / STATE_FILE).open("wb") as file:
        whole = _Whole(file)
        try:
            torch.save(state, cast("IO[bytes]", whole))
        except RuntimeError as error:  # torch has an error of its own for a file that could not be written
            raise whole.failure or error from None
        file.flush()
        os.fsync(file.fileno())
    remove_older(folder, step)


def remove_older(folder: Path, step: int) -> None:
    """Keep the checkpoint of `step` and the one before it; later ones cannot be whole, or it would not be written."""
    recent = [path for path in numbered(folder) if step_of(path) <= step][:2]
    for path in [*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*.partial")]:
        if path not in recent:
            shutil.rmtree(path, ignore_errors=True)


class _Whole:
    """A file that remembers why it could not be written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.failure: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self._file.flush()


def read_last(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint in `folder` that is whole, and its state on the CPU; None without one.

    One that is not whole, such as one of version 0.1.0's text trials, is passed over with a warning.
    """
    checkpoints = numbered(folder)
    for path in checkpoints:
        try:
            return path, _read(path / STATE_FILE)
        except Exception as error:  # torch and zipfile raise a dozen unrelated types for a file that is cut
            warn_of_damage(path, f"{type(error).__name__}: {error}")
    if checkpoints:
        logger.warning("%s: no checkpoint is whole, so the stage starts anew", folder)
    return None


def put_back(parameters: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """Give trained parameters the values that a checkpoint holds, in its order.

    Raises:
        ValueError: they are others, by their number or their shapes.
    """
    import torch

    shapes, saved_shapes = ([tuple(tensor.shape) for tensor in tensors] for tensors in (parameters, saved))
    if shapes != saved_shapes:
        pairs = zip(shapes, saved_shapes, strict=False)
        differing = next((f"; {own} for {other}" for own, other in pairs if own != other), "")
        raise ValueError(f"{len(shapes)} parameters are trained, and {len(saved_shapes)} were saved{differing}")
    with torch.no_grad():
        for parameter, tensor in zip(parameters, saved, strict=True):
            parameter.copy_(part_of(tensor, parameter) if is_spread(parameter) else tensor)


def _read(file: Path) -> dict[str, Any]:
    import torch

    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} in {file.name} has other content than was written")
    # Onto the CPU: on the GPU, the copies would stand beside the weights and count as the trial's peak.
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state


def warn_of_damage(checkpoint: Path, reason: str) -> None:
    """Say that a checkpoint is not used, and why, in one line."""
    logger.warning("%s is not whole, and is passed over: %s", checkpoint, " ".join(reason.split()))


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, whole or not, the last one first."""
    paths = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(paths, key=step_of, reverse=True)


def last_step(folder: Path) -> int | None:
    """The step of the last checkpoint in `folder`, whole or not."""
    return next((step_of(path) for path in numbered(folder)), None)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps of the stage that a checkpoint holds."""
    return int(checkpoint.name.rpartition("-")[2])
