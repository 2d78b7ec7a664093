"""Content hashes of local files and folders; each file is read once while it stays as it is."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


def content_of(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's files with their names below it, wherever the folder lies.

    Hidden files, such as .DS_Store, do not count. A path where nothing is gives the hash of nothing.
    """
    digest = hashlib.sha256()
    if path.is_file():
        digest.update(file_digest(path).encode())
    elif path.is_dir():
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path)
            if file.is_file() and not any(part.startswith(".") for part in name.parts):
                digest.update(f"{name.as_posix()}:{file_digest(file)}\n".encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    stat = path.stat()
    return _bytes(path, stat.st_size, stat.st_mtime_ns)


@cache
def _bytes(path: Path, size: int, changed: int) -> str:
    """The same of a file that has this size and was last changed then [ns]."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
