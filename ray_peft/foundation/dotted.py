"""Settings by dotted key: `train.steps` is `plain["train"]["steps"]`, and a place in a list is its number from 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

MISSING = object()
"""What stands at a key that leads nowhere."""


class WrongKey(ValueError):
    """A key that does not exist; the text says which part is missing."""


class NotAMapping(WrongKey):
    """Something on a key's way is neither a mapping nor a list."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} is not a mapping")
        self.key = key
        """Of what is no mapping."""


def join(key: str, part: object) -> str:
    """The key of a part of what stands at `key`; "" is the whole."""
    return f"{key}.{part}" if key else str(part)


def parts(plain: object) -> Iterator[tuple[Any, Any]]:
    """The entries of a mapping or list by name or place; nothing of a value."""
    if isinstance(plain, Mapping):
        yield from plain.items()
    elif isinstance(plain, list):
        yield from enumerate(plain)


def leaves(
    plain: object, is_leaf: Callable[[Any], bool] = lambda value: False, key: str = ""
) -> Iterator[tuple[str, Any]]:
    """What stands at the end of every key, in order.

    Args:
        plain: JSON-like data.
        is_leaf: what is not gone into, beside values, and mappings and lists without entries.
        key: of `plain` itself.
    """
    if is_leaf(plain) or not (isinstance(plain, Mapping | list) and plain):
        yield key, plain
        return
    for part, value in parts(plain):
        yield from leaves(value, is_leaf, join(key, part))


def get(plain: object, key: str) -> Any:
    """What stands at `key`, or `MISSING`."""
    for part in key.split("."):
        if isinstance(plain, list):
            plain = plain[int(part)] if part.isdecimal() and int(part) < len(plain) else MISSING
        else:
            plain = plain.get(part, MISSING) if isinstance(plain, Mapping) else MISSING
    return plain


def put(plain: Any, key: str, value: Any, *, add: bool) -> None:
    """Set what stands at `key` in `plain`, which is changed.

    Args:
        plain: a mapping of JSON-like data.
        key: such as train.steps or data.sources.0.train.
        value: what is put there.
        add: whether keys that are not there are added, with the mappings on the way.

    Raises:
        WrongKey: something on the way is neither mapping nor list, a list has no such entry, or there is no such key.
    """
    *parents, last = key.split(".")
    holder, reached = plain, ""
    for parent in parents:
        if isinstance(holder, dict) and add and holder.get(parent) is None:
            holder[parent] = {}
        holder = holder[_place(holder, parent, reached, key)]
        reached = join(reached, parent)
        if not isinstance(holder, dict | list):
            raise NotAMapping(reached)
    if isinstance(holder, dict) and add:
        holder[last] = value
    else:
        holder[_place(holder, last, reached, key)] = value


def _place(holder: Any, part: str, reached: str, key: str) -> Any:
    """The index of a part in what stands at `reached`."""
    if isinstance(holder, dict):
        if part not in holder:
            raise WrongKey(f"{key}: no such setting")
        return part
    if not part.isdecimal() or int(part) >= len(holder):
        raise WrongKey(
            f"{reached} is a list with {len(holder)} entries; name one by its place from 0 to {len(holder) - 1} "
            f"(found {part!r})"
        )
    return int(part)


def replaced(plain: Any, values: Mapping[str, Any], key: str = "") -> Any:
    """A copy of `plain` with what stands at each key of `values` replaced."""
    if key in values:
        return values[key]
    if isinstance(plain, dict):
        return {part: replaced(value, values, join(key, part)) for part, value in plain.items()}
    if isinstance(plain, list):
        return [replaced(value, values, join(key, part)) for part, value in enumerate(plain)]
    return plain
