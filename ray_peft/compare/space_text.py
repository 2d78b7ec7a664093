"""Search spaces as YAML text with comments, that a person can edit."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})
"""What YAML 1.1 reads as something else than text."""


def written(plain: Mapping[str, Any], head: str, comments: Mapping[str, str]) -> str:
    """The text of a search space; `space.read.parse` gives the same data back.

    Args:
        plain: the search space, as JSON-like data.
        head: opens the file, as comments.
        comments: lines above a key; `data.max_length` names one inside `data`, `method.0` an entry of its grid.
    """
    lines = _commented(head, "")
    for key, value in plain.items():
        lines += _commented(comments.get(key, ""), "")
        if key == "data" and isinstance(value, dict):
            lines += ["data:", *_data(value, comments)]
        elif key == "method" and isinstance(value, dict) and set(value) == {"grid"}:
            lines += ["method:", "  grid:"]
            for place, entry in enumerate(value["grid"]):
                lines += [*_commented(comments.get(f"method.{place}", ""), "    "), f"    - {flow(entry)}"]
        else:
            lines.append(f"{key}: {flow(value)}")
    return "\n".join(lines) + "\n"


def _data(data: Mapping[str, Any], comments: Mapping[str, str]) -> list[str]:
    lines = []
    for key, value in data.items():
        lines += _commented(comments.get(f"data.{key}", ""), "  ")
        if key == "sources":
            lines += ["  sources:", *(f"    - {flow(source)}" for source in value)]
        else:
            lines.append(f"  {key}: {flow(value)}")
    return lines


def _commented(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}".rstrip() for line in text.splitlines()]


def flow(value: Any) -> str:
    """JSON-like data on one line of YAML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text(str(key))}: {flow(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str):
        return _text(value)
    return json.dumps(value)


def _text(text: str) -> str:
    return text if _BARE.fullmatch(text) and text.lower() not in _WORDS else json.dumps(text, ensure_ascii=False)
