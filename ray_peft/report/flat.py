"""Nested settings as dotted keys: `{"method": {"rank": 8}}` is `{"method.rank": 8}`."""

from collections.abc import Mapping
from typing import Any

from ray_peft.spec import TrialSpec


def flatten(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of JSON-like data by dotted key, in order.

    A list of mappings is numbered (`data.sources.0.path`); any other list is one leaf.
    """
    leaves: dict[str, Any] = {}
    for name, value in plain.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{key}.")
        elif isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
            leaves |= flatten({str(index): entry for index, entry in enumerate(value)}, f"{key}.")
        else:
            leaves[key] = value
    return leaves


def flat_spec(spec: TrialSpec) -> dict[str, Any]:
    """Every setting of a trial by dotted key."""
    return flatten(spec.plain())
