"""Checks that passed in an earlier run, kept in the cache under the content of all that decides them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from ray_peft.foundation.cache import cache_folder
from ray_peft.foundation.whole import write_text

PACKAGE = Path(__file__).parent.parent


class Mark:
    """The result of one check. If an input of the check or the program changes, it is another mark."""

    def __init__(self, kind: str, decides: object) -> None:
        """`kind` names the check; `decides` is JSON-like data."""
        text = json.dumps([kind, decides, program()], sort_keys=True, default=str)
        self._file = cache_folder() / "checked" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"

    def read(self) -> dict[str, Any] | None:
        """The stored result; None if there is none, or it cannot be read."""
        try:
            plain = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return plain if isinstance(plain, dict) else None

    def write(self, plain: dict[str, Any]) -> None:
        """Store the result, unless the cache is read-only or full."""
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._file, json.dumps(plain))


@cache
def program() -> str:
    """A digest of this package's code, and of the name and version of every package that is installed beside it."""
    digest = hashlib.sha256(sys.version.encode())
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(PACKAGE).as_posix()}:".encode() + file.read_bytes())
    installed = {entry.name for folder in sys.path for entry in _entries(Path(folder)) if entry.suffix == ".dist-info"}
    digest.update("\n".join(sorted(installed)).encode())
    return digest.hexdigest()


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # an archive, or a folder that is not there
        return []
