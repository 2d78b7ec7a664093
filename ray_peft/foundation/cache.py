"""The folder of prepared data: how a new folder in it becomes visible in one step, and what goes if it is too large."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray_peft.foundation.storage import writing
from ray_peft.foundation.units import GIB
from ray_peft.foundation.whole import new_folder

KINDS = ("prepared", "latents", "images", "random", "gguf")
"""Folders of the cache whose entries are large: prepared rows, encoded images, the bases' images, random weights,
dequantised models."""
LIMIT_GIB = 100.0
"""What they may take together; RAY_PEFT_CACHE_GIB is another limit."""
RECENT_S = 24 * 3600.0
"""An entry that was used since then stays: a sweep that runs may need it."""


def cache_folder() -> Path:
    """Where prepared data is kept: RAY_PEFT_CACHE, or `ray_peft` in the user's cache folder."""
    set_by_user = os.environ.get("RAY_PEFT_CACHE")
    return Path(set_by_user) if set_by_user else Path.home() / ".cache" / "ray_peft"


@contextmanager
def made_whole(folder: Path, last: str) -> Iterator[Path]:
    """An empty folder to fill, which is moved to `folder` in one step afterwards, so that no reader sees half of it.

    If another process was first, its folder is kept: names are content hashes, so it holds the same. After an error
    the partial folder is removed.

    Args:
        folder: where it belongs; it may not be there yet.
        last: a file that every whole `folder` holds.

    Raises:
        StorageError: it cannot be written, or not be moved, and `folder` is not whole either.
    """
    filled = False
    with writing(folder, "set RAY_PEFT_CACHE to a folder with space that may be written"):
        try:
            with new_folder(folder) as partial:
                yield partial
                filled = True
        except OSError:
            if not filled or not (folder / last).is_file():
                raise


def entry(kind: str, key: str) -> Path:
    """The folder of an entry of one of `KINDS`, whether it is there or not; it counts as used now."""
    folder = cache_folder() / kind / key
    with contextlib.suppress(OSError):  # it is not there, or the cache is read-only
        os.utime(folder)
    return folder


@dataclass(frozen=True)
class Entry:
    """A large entry of the cache."""

    folder: Path
    num_bytes: int
    used_at: float
    """Seconds since 1970."""

    def remove(self) -> None:
        """Remove it: first from sight, so that nobody reads half of it."""
        hidden = self.folder.with_name(f".{self.folder.name}.{os.urandom(4).hex()}.partial")
        with contextlib.suppress(OSError):
            self.folder.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def entries() -> list[Entry]:
    """The large entries, those first that were not used for longest; what a killed process left of one is one, too."""
    listed = []
    for kind in KINDS:
        for folder in (cache_folder() / kind).glob("*"):
            with contextlib.suppress(OSError):  # somebody removes it
                listed.append(Entry(folder, size_of(folder), folder.stat().st_mtime))
    return sorted(listed, key=lambda entry: entry.used_at)


def trim() -> list[Entry]:
    """Remove the entries that were not used for longest until the rest is within the limit; returns those."""
    limit = float(os.environ.get("RAY_PEFT_CACHE_GIB") or LIMIT_GIB) * GIB
    listed, removed = entries(), []
    total = sum(entry.num_bytes for entry in listed)
    for old in listed:
        if total <= limit or old.used_at > time.time() - RECENT_S:
            break
        old.remove()
        total -= old.num_bytes
        removed.append(old)
    return removed


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in and below a folder; what vanishes meanwhile counts as nothing."""
    total = 0
    for file in [path] if path.is_file() else path.rglob("*"):
        with contextlib.suppress(OSError):
            total += file.lstat().st_size if file.is_file() else 0
    return total
