"""Measured numbers, which may be NaN or infinite: JSON has neither, so they are written as text."""

from __future__ import annotations

import math
from typing import Any, cast

from pydantic import ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from ray_peft.foundation.strict import Strict

_TEXTS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json(value: Any) -> Any:
    """JSON-like data with every number that is not finite as "NaN", "Infinity" or "-Infinity"."""
    if isinstance(value, dict):
        return {key: to_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def from_json(value: Any) -> Any:
    """A number that `to_json` made text as a number again; other values as they are."""
    return _TEXTS.get(value, value) if isinstance(value, str) else value


def _lenient(schema: Any, *, top: bool = True) -> Any:
    """A schema in which floats may be texts; models inside it stay as they are."""
    if isinstance(schema, list):
        return [_lenient(part, top=False) for part in schema]
    if not isinstance(schema, dict) or (schema.get("type") == "model" and not top):
        return schema
    if schema.get("type") == "float":
        return core_schema.no_info_before_validator_function(from_json, cast(CoreSchema, schema))
    parts = {key: _lenient(inner, top=top and key != "fields") for key, inner in schema.items() if key != "metadata"}
    return schema | parts


class Measured(Strict):
    """A value whose numbers may be NaN or infinite, and survive JSON all the same."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Let every number of its own fields be such a text, too.

        Not by a validator on all fields: pydantic 2.14 then takes the fields of specs for Python data, not for JSON.
        """
        return cast(CoreSchema, _lenient(handler(source)))

    def plain(self) -> dict[str, Any]:
        """The value as JSON-like data; `from_plain` gives an equal value back."""
        plain: dict[str, Any] = to_json(super().plain())
        return plain
