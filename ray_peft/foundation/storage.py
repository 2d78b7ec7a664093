"""Errors of writing: a full disk, a read-only folder, a lost mount. Each becomes one error that names the path."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from ray_peft.errors import StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXT = ("No space left on device", "Disk quota exceeded", "File too large")


def is_full(error: BaseException) -> bool:
    """True if a disk is full: also for libraries that put the system's words into an error of their own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return any(text in str(error) for text in _FULL_TEXT)


def error_line(error: OSError, where: Path | None = None) -> str:
    """An error of the operating system in one line: the path, what happened, and what helps.

    Args:
        error: it names no path if an open file could not be written.
        where: what to name then.
    """
    paths = " -> ".join(str(path) for path in (error.filename or where, error.filename2) if path is not None)
    words = error.strerror or str(error) or type(error).__name__
    helps = "; free some space, or use a folder on another disk" if is_full(error) else ""
    return f"{paths + ': ' if paths else ''}{words}{helps}"


@contextlib.contextmanager
def writing(path: Path, way_out: str) -> Iterator[None]:
    """Turn any error of writing below `path` into one error.

    Args:
        path: what is written.
        way_out: what the user can do, as in "set RAY_PEFT_CACHE to another folder".

    Raises:
        StorageError: the system refused.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None and not is_full(error):  # of a library, which says something else by it
            raise
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}; {way_out}") from error
    except Exception as error:  # safetensors and torch have errors of their own for a full disk
        if not is_full(error):
            raise
        raise StorageError(f"{path}: cannot be written: no space left; {way_out}") from error
