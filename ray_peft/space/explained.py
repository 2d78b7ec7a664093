"""What is wrong with settings, in the words of the file that they come from: one line a problem."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from ray_peft.spec import TrialSpec
from ray_peft.spec.base import WarmStart

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

_NUMBER = re.compile(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?")
_KINDS_OF_NUMBERS = ("int", "float")


def explain(error: ValidationError, prefix: str = "") -> Iterator[str]:
    """One line per problem: key, rule, value found."""
    for problem in _own(error.errors(include_url=False)):
        key = ".".join(str(part) for part in (prefix, *_as_written(problem["loc"])) if str(part))
        value_text = f" (found {short(problem['input'])})"
        if problem["type"] == "missing":
            yield f"{key}: missing"
        elif problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), field_names(), n=1)
            yield f"{key}: unknown key{f', did you mean {near[0]}?' if near else ''}{value_text}"
        elif problem["type"] == "value_error":
            for line in problem["msg"].removeprefix("Value error, ").splitlines():
                yield f"{key}: {line}" if key else line
        elif problem["type"] in ("union_tag_invalid", "union_tag_not_found"):
            yield f"{key}.{_of_known_names(problem)}"
        else:
            yield f"{key or 'trial'}: {problem['msg']}{value_text}{_way_out(problem['type'], problem['input'])}"


def _of_known_names(problem: ErrorDetails) -> str:
    """The message on a part whose name, such as that of a method, is unknown or missing."""
    context = problem.get("ctx", {})
    field, tag = str(context["discriminator"]).strip("'"), context.get("tag")
    if tag is None:
        return f"{field}: missing (found {short(problem['input'])})"
    names = [name.strip(" '") for name in str(context["expected_tags"]).split(",")]
    near = difflib.get_close_matches(str(tag).lower(), names, n=1)
    return f"{field}: must be one of {', '.join(names)} (found {tag!r}){f'; did you mean {near[0]}?' if near else ''}"


def _own(problems: list[ErrorDetails]) -> Iterator[ErrorDetails]:
    """Problems that are not there because of another one.

    A list without its wrong entries is too short for pydantic, and what is neither a whole number nor a float has two
    problems.
    """
    places = [problem["loc"] for problem in problems]
    for problem in problems:
        place = problem["loc"]
        inside = any(other != place and other[: len(place)] == place for other in places)
        if problem["type"] == "too_short" and inside:
            continue
        if all((*place[:-1], kind) in places for kind in _KINDS_OF_NUMBERS):
            if place[-1] == "float":
                yield {**problem, "loc": place[:-1]}
            continue
        yield problem


def _way_out(kind: str, value: Any) -> str:
    """The way out where YAML reads something else than was meant."""
    if kind == "dict_type" and isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return "; several stand in {grid: [...]}"
    if kind == "dict_type" and isinstance(value, str) and value.isidentifier():
        return f"; write {{name: {value}}}"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "; write it in quotes"
    if kind in ("int_type", "float_type") and isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        return "; write it without quotes"
    return ""


def _as_written(location: tuple[int | str, ...]) -> list[int | str]:
    """A place in an ensemble's members as it stands in the file: pydantic adds the method's name after `method`."""
    if "members" not in location:
        return list(location)
    return [part for before, part in zip((None, *location), location, strict=False) if before != "method"]


@cache
def field_names() -> list[str]:
    """Every key that a file may hold, for suggestions."""
    schemas = [spec.model_json_schema() for spec in TrialSpec.kinds().values()]
    definitions = [definition for schema in schemas for definition in schema["$defs"].items()]
    names = {key for name, part in definitions if name != WarmStart.__name__ for key in part.get("properties", {})}
    names.remove("warm_start")  # no file sets it
    return sorted(names | set(TrialSpec.model_fields))


def short(value: Any, limit: int = 60) -> str:
    """A value as Python writes it, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
