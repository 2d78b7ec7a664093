"""What can be removed without losing a result: the cache, and what Ray and killed processes left in sweeps' folders."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_peft.errors import DataError, SearchSpaceError
from ray_peft.foundation import cache
from ray_peft.store.ledger import Ledger


@dataclass(frozen=True)
class Removable:
    """A file or folder that nothing needs, or that is made anew when it is needed."""

    path: Path
    num_bytes: int


def sweeps_in(outputs: Path) -> list[Path]:
    """The folders of sweeps directly in `outputs`."""
    return sorted(path.parent for path in outputs.glob("*/sweep.json"))


def check_sweeps(folders: Sequence[Path]) -> None:
    """Raise for a folder that is no sweep's.

    Raises:
        DataError: one holds no sweep.json.
    """
    for folder in folders:
        if not (folder / "sweep.json").is_file():
            raise DataError(f"{folder}: holds no sweep.json; give the folder of a sweep, such as outputs/quickstart")


@contextlib.contextmanager
def unused(folder: Path) -> Iterator[bool]:
    """Hold a sweep's folder; false if a sweep runs there."""
    with contextlib.ExitStack() as holding:
        try:
            holding.enter_context(Ledger(folder).locked())
        except SearchSpaceError:
            yield False
            return
        yield True


def left_in(folder: Path) -> list[Removable]:
    """What Ray and killed processes left in a sweep's folder. Rows, adapters and checkpoints stay."""
    partial = [path for path in (folder / "trials").rglob(".*") if path.suffix in (".partial", ".tmp", ".broken")]
    paths = [folder / "ray", *partial, *folder.glob(".*.tmp")]
    return [Removable(path, cache.size_of(path)) for path in paths if path.exists()]


def cached() -> list[Removable]:
    """The large entries of the cache; trials make them anew."""
    return [Removable(entry.folder, entry.num_bytes) for entry in cache.entries()]


def remove(removable: Removable) -> None:
    """Remove it.

    Raises:
        OSError: the system refuses.
    """
    if removable.path.is_dir():
        shutil.rmtree(removable.path)
    else:
        removable.path.unlink(missing_ok=True)
