"""One process at a time: lock files that the system frees when their holder dies."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray_peft.errors import StorageError

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
"""What file systems answer that take no locks, such as NFS 3 without its lock service."""


@contextmanager
def locked(path: Path, timeout_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`, which stays there afterwards.

    Args:
        path: made if it is not there, with its folder.
        timeout_s: how long to wait for another holder.

    Raises:
        TimeoutError: another process, or another part of this one, holds it for longer.
        StorageError: the file system takes no locks.
        OSError: the file cannot be made.
    """
    import filelock

    # thread_local=False: the lock may be freed by another thread than the one that took it.
    # fallback_to_soft=False: a soft lock is a file that a killed process leaves behind.
    lock = filelock.FileLock(path, timeout=timeout_s, thread_local=False, poll_interval=0.1, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise TimeoutError(f"{path} is held by another process") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise StorageError(
            f"{path.parent}: its file system takes no locks ({error.strerror}), without which two processes could "
            "write there at once; on NFS, mount it as version 4, or start rpc.statd for version 3 (where one machine "
            "alone writes, the mount option nolock will do), or use a folder on another file system"
        ) from None
    try:
        yield
    finally:
        lock.release()
