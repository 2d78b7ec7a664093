"""Fields of a row that recipes read as text, and how a wrong one is described."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_peft.tasks.llm_sft.conversation import WrongShape


def text_of(row: Mapping[str, Any], field: str, default: str | None = None) -> str:
    """The text of a field, without white space around it; empty where the file writes null.

    Raises:
        WrongShape: there is no such field, or it is no text.
    """
    value = row.get(field, default)
    if value is None and field in row:
        return ""  # null is how many files write an empty field
    if not isinstance(value, str):
        reason = f"field {field!r} must be text (found {kind(value)}"
        raise WrongShape(f"{reason}; the row has {keys(row)})", f"{reason})")
    return value.strip()


def kind(value: object) -> str:
    """The type of a value in a message."""
    return "nothing" if value is None else type(value).__name__


def keys(row: Mapping[str, Any]) -> str:
    """The fields of a row in a message."""
    return ", ".join(map(str, row)) or "no fields"
