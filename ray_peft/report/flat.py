"""Nested settings as dotted keys: `{"method": {"rank": 8}}` is `{"method.rank": 8}`."""

from collections.abc import Mapping
from typing import Any

from ray_peft.foundation import dotted
from ray_peft.spec import TrialSpec


def flatten(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of JSON-like data by dotted key, in order; a mapping without entries has none.

    A list of mappings is numbered (`data.sources.0.path`); any other list is one leaf.
    """
    return {key: value for key, value in dotted.leaves(plain, _is_leaf) if not isinstance(value, Mapping)}


def _is_leaf(value: Any) -> bool:
    return isinstance(value, list) and not all(isinstance(entry, Mapping) for entry in value)


def flat_spec(spec: TrialSpec) -> dict[str, Any]:
    """Every setting of a trial by dotted key."""
    return flatten(spec.plain())
