"""The folder of prepared data, and how a new folder in it becomes visible in one step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_peft.foundation.storage import writing
from ray_peft.foundation.whole import new_folder


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
