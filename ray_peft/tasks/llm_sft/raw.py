"""A row as its file holds it, before a recipe reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RawRow:
    """One row of a file: its values, or why they cannot be read."""

    file: str
    """The file that it stands in; of a folder, one of its shards."""
    number: int
    """Counted from 1 in its file."""
    place: str
    """Where it stands, for people: `line 3` of a text file, else `row 3`."""
    values: Mapping[str, Any] | None
    """None where the row cannot be read."""
    reason: str = ""
    """Why it cannot be read, in the words under which such rows are counted."""
    detail: str = ""
    """The same with the place in the row, and what helps."""


def unreadable(file: str, number: int, place: str, reason: str, detail: str = "") -> RawRow:
    """A row that cannot be read."""
    return RawRow(file, number, place, None, reason, detail or reason)


NOT_UTF8 = "bytes that are not UTF-8"

ENCODING_HELP = (
    "if the file is Latin-1, `iconv -f latin1 -t utf-8 OLD > NEW` converts it (else name its encoding after -f)"
)


def undecodable(text: str) -> str | None:
    """Where `text`, decoded as UTF-8 with `surrogateescape`, holds a byte that is none; None if there is no such byte.

    Such a byte stands in the text as a code point from U+DC80 to U+DCFF, which UTF-8 itself never gives.
    """
    try:
        text.isascii() or text.encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        return f"byte 0x{byte:02x} at column {error.start + 1} is not UTF-8 text; {ENCODING_HELP}"
    return None
