"""YAML text -> plain data, without the readings of YAML 1.1 that surprise: no silent octal, base-60 or date."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from ray_peft.errors import SearchSpaceError

MOST_VALUES = 1_000_000
"""Values in a file; more come from aliases (*name) of lists that hold aliases, and would never be gone through."""

LARGEST = 2**53
"""Whole numbers beyond this are no setting of anything, and not exact in JSON everywhere."""

DEEPEST = 100
"""Levels of lists and mappings in each other; a list that contains itself has no end of them."""


class _TooMany(Exception):
    """More values than a file can mean."""


class _Loader(yaml.SafeLoader):
    """YAML in which a repeated key is an error instead of a silent overwrite, and 1e-4 is a number."""


# A date is text: no setting is a date, and a revision may look like one.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # <<: what it brings gives way to the keys beside it
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            text = f"key {key!r} is not text" + ("; write it in quotes" if not isinstance(key, list | dict) else "")
            raise yaml.constructor.ConstructorError(None, None, text, key_node.start_mark)
        if key in keys:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        keys.add(key)
    return loader.construct_mapping(node, deep=True)


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    """A whole number or a float, unless YAML 1.1 reads it as another number than most people do."""
    text = str(node.value)
    value: int | float = (
        loader.construct_yaml_int(node) if node.tag.endswith(":int") else loader.construct_yaml_float(node)
    )
    problem = None
    if ":" in text:
        problem = f"{text} means {value} in YAML, which reads it in base 60; write {value}, or quotes around it"
    elif re.fullmatch(r"[-+]?0[0-9_]+", text) and int(text.replace("_", "")):
        decimal = int(text.replace("_", ""))
        problem = f"{text} means {value} in YAML, which reads it as octal; write {value} or {decimal}"
    elif isinstance(value, int) and abs(value) > LARGEST:
        problem = f"{text} is larger than any setting can be"
    if problem is not None:
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return value


def _refused(loader: _Loader, node: yaml.Node) -> Any:
    problem = f"{node.tag.replace('tag:yaml.org,2002:', '!!')} is no value that a setting takes"
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)
for _tag in ("binary", "timestamp", "omap", "pairs", "set"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _refused)


def read(path: Path) -> str:
    """The text of a YAML file: UTF-8, or UTF-16 with its mark.

    Raises:
        SearchSpaceError: no such file, or it is no text.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise SearchSpaceError(f"{path}: no such file") from None
    except OSError as error:
        raise SearchSpaceError(f"{path}: cannot be read: {error.strerror}") from None
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise SearchSpaceError(
            f"{path}: line {line}: is not {'UTF-16' if marked else 'UTF-8'} text ({error.reason}); save it as UTF-8"
        ) from None


def parse(text: str, source: str) -> Any:
    """Plain data of one YAML document; `source` names it in errors.

    Raises:
        SearchSpaceError: it is not valid YAML, holds a value that no setting takes, or a number that is not finite.
    """
    try:
        plain = yaml.load(text, Loader=_Loader)  # noqa: S506 - a subclass of SafeLoader
        infinite = [(key, value) for key, value in _leaves(plain) if isinstance(value, float) and not isfinite(value)]
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise SearchSpaceError(f"{source}: line {line}: character U+{code:04X} is not allowed in YAML") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown line"
        reason = error.problem or "not valid YAML"
        if reason == "but found another document":
            reason = "a second document begins (---); one file is one search space"
        raise SearchSpaceError(f"{source}: {where}: {reason}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise SearchSpaceError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    except _TooMany as error:
        raise SearchSpaceError(f"{source}: {error}") from None
    except RecursionError:
        raise SearchSpaceError(f"{source}: is nested too deeply, or contains itself") from None
    problems = [f"{source}: {key}: must be a finite number (found {value})" for key, value in infinite]
    if problems:
        raise SearchSpaceError("\n".join(problems))
    return plain


def _leaves(value: Any) -> Iterator[tuple[str, Any]]:
    """Plain values with their dotted keys.

    Raises:
        _TooMany: there are more than MOST_VALUES.
        RecursionError: they are nested more than DEEPEST levels deep.
    """
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    for _ in range(MOST_VALUES):
        if not waiting:
            return
        place, value = waiting.pop()
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if inner is None:
            yield ".".join(map(str, place)) or "value", value
        elif len(place) == DEEPEST:
            raise RecursionError
        else:
            waiting += [((*place, part), entry) for part, entry in inner][::-1]
    raise _TooMany(f"aliases (*name) repeat its values to more than {MOST_VALUES:,}; write fewer")
