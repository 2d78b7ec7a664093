"""The header of a safetensors file: the names, dtypes, shapes and places of its weights, and why it cannot be read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ray_peft.errors import ModelError, first_line
from ray_peft.foundation.substitutes import HEAD, substitute

LARGEST_HEADER = 100 * 10**6
"""The safetensors format allows no larger header."""


@dataclass(frozen=True)
class Entry:
    """One weight in a safetensors file."""

    name: str
    dtype: str
    """As the file spells it, such as BF16."""
    shape: tuple[int, ...]
    file: Path
    begin: int
    """First byte in the file."""
    end: int


def entries(file: Path) -> list[Entry]:
    """Every weight of a file; nothing of their numbers is read.

    Raises:
        ModelError: the file is cut, a pointer, or not of this format.
    """
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        text = opened.read(length) if length <= LARGEST_HEADER else b""
    try:
        header = json.loads(text.decode("utf-8"))
        header.pop("__metadata__", None)
        weights = [_entry(name, value, file, 8 + length) for name, value in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ModelError(f"{file}: {_why_no_header(file)}") from None
    size, expected = file.stat().st_size, max((entry.end for entry in weights), default=8 + length)
    if size < expected:
        raise ModelError(f"{file}: is cut: it has {size:,} of {expected:,} bytes; download it again")
    _check_format(file)
    return weights


def _entry(name: str, value: dict[str, list[int]], file: Path, start: int) -> Entry:
    begin, end = (start + int(offset) for offset in value["data_offsets"])
    return Entry(name, str(value["dtype"]), tuple(value["shape"]), file, begin, end)


def _check_format(file: Path) -> None:
    """The library's own check of the header: nothing of the content is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ModelError(f"{file}: damaged ({first_line(error)}); download it again") from None


def _why_no_header(file: Path) -> str:
    with file.open("rb") as opened:
        head = opened.read(HEAD)
    if (text := substitute(head)) is not None:
        return f"is {text}"
    if head.startswith(b"PK\x03\x04"):
        return "is a torch or zip archive with the wrong name, not a safetensors file"
    if int.from_bytes(head[:8], "little") < LARGEST_HEADER:
        return "is cut or damaged: its header is not whole; download it again"
    return "not a safetensors file, or a damaged one"
