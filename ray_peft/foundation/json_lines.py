"""Files with one JSON value a line, as a killed process may leave them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from ray_peft.errors import DataError

logger = logging.getLogger(__name__)

ValueT = TypeVar("ValueT", bound=BaseModel)

HEAD_BYTES = 256
"""Of the start of a file, by which it is known again."""


def read_lines(path: Path, kind: type[ValueT]) -> list[ValueT]:
    """The values of a JSON Lines file; none if there is no file.

    A broken last line, as a killed process leaves it, is passed over with a warning.

    Raises:
        DataError: another line is broken, or one is no such value.
    """
    values = []
    for number, line in _whole_lines(path):
        try:
            values.append(kind.model_validate_json(line))
        except ValidationError as error:
            raise DataError(f"{path}: line {number}: {problem(error)}") from None
    return values


def added_lines(path: Path, offset: int) -> tuple[list[bytes], int]:
    """The whole lines from `offset` on, and the offset after them: another process adds to the file meanwhile.

    Args:
        path: of the file; where there is none, there are no lines.
        offset: bytes that were read before.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read()
    except FileNotFoundError:
        return [], offset
    whole = content[: content.rfind(b"\n") + 1]
    return whole.split(b"\n")[:-1], offset + len(whole)


class GrowingFile:
    """A file to which another process adds lines, read again and again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._identity: tuple[int, bytes] = (0, b"")
        """The inode of the file that was read, which a new file may get once more, and its first bytes."""

    def new_lines(self) -> tuple[list[bytes], bool]:
        """The whole lines that are new, and whether those that were read before are no longer in the file.

        The latter where the file is gone, was replaced, or is shorter than it was; then all of its lines are new.
        """
        inode, head, size = self._look()
        same = inode == self._identity[0] and head.startswith(self._identity[1]) and size >= self._read
        began_again = bool(self._read) and not same
        lines, self._read = added_lines(self._path, 0 if began_again else self._read)
        self._identity = inode, head[: self._read]
        return lines, began_again

    def _look(self) -> tuple[int, bytes, int]:
        """Inode, first bytes and size of the file; of one that is not there, nothing."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                return status.st_ino, file.read(HEAD_BYTES), status.st_size
        except FileNotFoundError:
            return 0, b"", 0


def drop_torn_line(path: Path) -> None:
    """Cut off what a kill or a full disk has left in the middle of the last line; nothing if there is no file."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        if not size:
            return
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def problem(error: ValidationError) -> str:
    """The first problem of a value, with its dotted key."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    reason = f"{key}: {first['msg']}" if key else first["msg"]
    way = "read it with the version that wrote it, or give another folder"
    return f"{reason}; {way}" if first["type"] in ("extra_forbidden", "missing") else reason


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers from 1; a last one that is not JSON is left out with a warning."""
    if not path.exists():
        return
    # Bytes, since str.splitlines also splits at characters that JSON text may hold, such as U+2028.
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    for index, (number, line) in enumerate(lines):
        try:
            json.loads(line)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            if index < len(lines) - 1:
                way = "remove the line; of results.jsonl, the sweep then runs its trial again"
                raise DataError(f"{path}: line {number}: not valid JSON: {error}; {way}") from None
            logger.warning("%s: line %d, the last one, is incomplete and was passed over", path, number)
            return
        yield number, line
