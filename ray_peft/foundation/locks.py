"""One process at a time: lock files that the system frees when their holder dies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, timeout_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`, which stays there afterwards.

    Args:
        path: made if it is not there, with its folder.
        timeout_s: how long to wait for another holder.

    Raises:
        TimeoutError: another process, or another part of this one, holds it for longer.
        OSError: the file cannot be made.
    """
    import filelock

    # thread_local=False: the lock may be freed by another thread than the one that took it.
    lock = filelock.FileLock(path, timeout=timeout_s, thread_local=False, poll_interval=0.1)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise TimeoutError(f"{path} is held by another process") from None
    try:
        yield
    finally:
        lock.release()
