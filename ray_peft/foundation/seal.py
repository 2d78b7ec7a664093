"""A folder's seal: sizes and checksums of its files, written last; it proves that all of them are as they were."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ray_peft.foundation.whole import write_text

SEAL_FILE = "sealed.json"


def seal(folder: Path) -> None:
    """Write the seal of the files that `folder` holds now, at any depth."""
    files = {path.relative_to(folder).as_posix(): _print_of(path) for path in sorted(_files(folder))}
    write_text(folder / SEAL_FILE, json.dumps(files, indent=1))


def broken(folder: Path) -> str | None:
    """Why a folder is not what was sealed, in words; None if it is. Files that came later do not count."""
    try:
        files: dict[str, list[object]] = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
        if not files:
            return f"{SEAL_FILE} is damaged"
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected[0]:
                return f"{name} has {path.stat().st_size:,} bytes, not {expected[0]:,}"
            if _print_of(path) != expected:
                return f"{name} has other content than was written"
    except OSError as error:
        return f"{Path(error.filename or SEAL_FILE).name} cannot be read: {error.strerror}"
    except (ValueError, TypeError, AttributeError, LookupError):
        return f"{SEAL_FILE} is damaged"
    return None


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path != folder / SEAL_FILE]


def _print_of(path: Path) -> list[object]:
    """A file's size in bytes and its SHA-256."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
