"""Checkpoints of a stage: written aside, moved whole, and the last whole one found again."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"


def write(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write `checkpoint-<step>` into `folder` in one move; older ones go after that."""
    import torch

    target = folder / f"checkpoint-{step}"
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with (partial / STATE_FILE).open("wb") as file:
        whole = _Whole(file)
        try:
            torch.save(state, whole)
        except RuntimeError as error:  # torch has an error of its own for a file that could not be written
            raise whole.failure or error from None
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    for old in folder.glob("checkpoint-*"):
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


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


def read_last(folder: Path, device: str) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint in `folder` that can be read, and its state on `device`; None without one.

    One that cannot be read, such as one of version 0.1.0's text trials, is passed over with a warning.
    """
    import torch

    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    for path in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            state: dict[str, Any] = torch.load(path / STATE_FILE, map_location=device, weights_only=True)
        except Exception as error:  # torch and zipfile raise a dozen unrelated types for a file that is cut
            logger.warning("%s cannot be read, and is passed over: %s: %s", path, type(error).__name__, error)
            continue
        return path, state
    return None


def random_state(device: str) -> dict[str, Any]:
    """What dropout draws from, on the CPU and on the GPU; the same on every worker, since all start from one seed."""
    import torch

    state = {"cpu": torch.get_rng_state()}
    return state if device == "cpu" else state | {"cuda": torch.cuda.get_rng_state(device)}


def draw_from(state: dict[str, Any], device: str) -> None:
    """Go on drawing where `random_state` was taken. A pass that is recorded afterwards draws from there on, too."""
    import torch

    torch.set_rng_state(state["cpu"].cpu())  # loaded onto the device, as all of a checkpoint
    if device != "cpu" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
