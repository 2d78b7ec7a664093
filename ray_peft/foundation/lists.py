"""Lists of names in messages: the first few of many, and the one that is there twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def some(names: Sequence[str], most: int = 3, kind: str = "") -> str:
    """The first `most` names, and how many more there are; `kind` says of what, such as "keys"."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more {kind}".rstrip() if more > 0 else "")


def first_duplicate(names: Iterable[str]) -> str | None:
    """The first name that is there more than once; None if all differ."""
    return next((name for name, count in Counter(names).items() if count > 1), None)
