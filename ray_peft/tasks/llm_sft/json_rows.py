"""Rows from JSON text, whatever the file's ending says: one object a line, a list of objects, or a list in an object.

Objects are also read when each is spread over several lines. A key that stands twice in one object makes a row
unreadable, since RFC 8259 leaves open which of the two values is meant.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TextIO

from ray_peft.errors import DataError
from ray_peft.foundation.lists import some
from ray_peft.tasks.llm_sft.raw import NOT_UTF8, RawRow, undecodable, unreadable

_OF_A_ROW = frozenset({"messages", "conversations", "conversation", "tools", "functions"})
"""Lists of objects that are one row's own."""
_SPACE = " \t\r\n\ufeff"


class _NotJson(Exception):
    """Text that is not one JSON value."""

    def __init__(self, reason: str, detail: str, line: int = 1) -> None:
        super().__init__(detail)
        self.reason = reason
        self.line = line


class _Parser:
    """Parses JSON, and notices keys that stand twice in one object."""

    def __init__(self) -> None:
        self._duplicates: dict[int, tuple[object, str]] = {}
        """Of the last value: objects in which a key stands twice, with the key, by their identity."""
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def value(self, text: str) -> Any:
        """The one value of `text`.

        Raises:
            _NotJson: it is no JSON, or more than one value.
        """
        value, end = self.first(text)
        if end < len(text):
            raise _not_json(json.JSONDecodeError("Extra data", text, end))
        return value

    def first(self, text: str, begin: int = 0) -> tuple[Any, int]:
        """The first value from `begin` on, and where the next one may begin.

        Raises:
            _NotJson: there is none.
        """
        self._duplicates = {}
        try:
            value, end = self._decoder.raw_decode(text, _skip_space(text, begin))
        except (ValueError, RecursionError) as error:
            raise _not_json(error) from None
        return value, _skip_space(text, end)

    def duplicate_key(self, row: object) -> str | None:
        """The key that stands twice in an object of `row`, which is part of the last value; None if there is none."""
        values = [row] if self._duplicates else []
        while values:
            value = values.pop()
            if id(value) in self._duplicates:
                return self._duplicates[id(value)][1]
            values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return None

    def own_duplicate_key(self, value: object) -> str | None:
        """The key that stands twice in the object `value` itself."""
        return self._duplicates[id(value)][1] if id(value) in self._duplicates else None

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            keys = [key for key, _ in pairs]
            self._duplicates[id(values)] = values, next(key for key in keys if keys.count(key) > 1)
        return values


def json_rows(file: str, text: TextIO, *, escaped: bool) -> Iterator[RawRow]:
    """The rows of JSON text.

    Args:
        file: its name, for messages; one that ends in .json may not hold a single row without a list.
        text: the text, without its byte order mark.
        escaped: whether bytes that are not UTF-8 stand in it as surrogates.

    Raises:
        DataError: the text as a whole is no JSON, or one value without a list of objects.
    """
    numbered = ((number, line) for number, line in enumerate(text, start=1) if line.strip(_SPACE))
    first = next(numbered, None)
    if first is None:
        return
    second = next(numbered, None)
    lines = [line for line in (first, second) if line is not None]
    if _is_object(first[1]) and second is not None:
        yield from _lines(file, chain(lines, numbered), escaped)
        return
    blank = "\n" * (first[0] - 1)
    between = "\n" * (second[0] - first[0] - 1) if second else ""
    complete = blank + first[1] + between + (second[1] + text.read() if second else "")
    yield from _complete_rows(file, complete, lines, escaped)


def _complete_rows(file: str, text: str, lines: Sequence[tuple[int, str]], escaped: bool) -> Iterator[RawRow]:
    """The rows of a text whose first line is not a row by itself."""
    parser = _Parser()
    try:
        value = parser.value(text)
    except _NotJson as error:
        objects = _objects(file, text)
        if objects is not None:
            _check_bytes(file, text, escaped)
            yield from objects
        elif _is_in_lines(file, [line for _, line in lines]):
            yield from _lines(file, _numbered(text), escaped)
        else:
            raise DataError(f"{file}: line {error.line}: {error}") from None
        return
    _check_bytes(file, text, escaped)
    rows = _listed(file, value)
    if isinstance(value, dict) and (key := parser.own_duplicate_key(value)) is not None and rows != [value]:
        raise DataError(f"{file}: key {key!r} stands twice in the object around the rows; leave one of them")
    for number, row in enumerate(rows, start=1):
        yield _row(file, number, f"row {number}", row, parser)


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines(), which also splits at characters that may stand within JSON text.
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip(_SPACE))


def _check_bytes(file: str, text: str, escaped: bool) -> None:
    """Find the line of the first byte that is not UTF-8.

    Raises:
        DataError: there is one.
    """
    if escaped and undecodable(text) is not None:
        for number, line in enumerate(text.split("\n"), start=1):
            problem = undecodable(line)
            if problem is not None:
                raise DataError(f"{file}: line {number}: {problem}")


def _lines(file: str, numbered: Iterator[tuple[int, str]], escaped: bool) -> Iterator[RawRow]:
    """One row a line."""
    parser = _Parser()
    for count, (number, line) in enumerate(numbered, start=1):
        problem = undecodable(line) if escaped else None
        if problem is not None:
            yield unreadable(file, count, f"line {number}", NOT_UTF8, problem)
            continue
        try:
            value = parser.value(line.rstrip("\r\n"))
        except _NotJson as error:
            yield unreadable(file, count, f"line {number}", error.reason, str(error))
        else:
            yield _row(file, count, f"line {number}", value, parser)


def _row(file: str, number: int, place: str, value: object, parser: _Parser) -> RawRow:
    if not isinstance(value, dict):
        detail = f"must be a JSON object (found {type(value).__name__})"
        return unreadable(file, number, place, "not a JSON object", detail)
    key = parser.duplicate_key(value)
    if key is not None:
        return unreadable(
            file,
            number,
            place,
            "a key twice in one object",
            f"key {key!r} stands twice in one object, so it is unclear which value is meant",
        )
    return RawRow(file, number, place, value)


def _objects(file: str, text: str) -> Iterator[RawRow] | None:
    """The rows of a text of objects that follow each other, each over one or more lines; None if it is none."""
    rows: list[RawRow] = []
    begin, end, line, parser = 0, _skip_space(text, 0), 1, _Parser()
    while end < len(text):
        line += text.count("\n", begin, end)
        begin = end
        try:
            value, end = parser.first(text, begin)
        except _NotJson:
            return None
        if not isinstance(value, dict) or (end < len(text) and "\n" not in text[begin:end]):
            return None
        rows.append(_row(file, len(rows) + 1, f"line {line}", value, parser))
    return iter(rows)


def _listed(file: str, value: object) -> Sequence[object]:
    """The rows of a whole JSON text: a list, the one list of objects in an object, or the object alone.

    Raises:
        DataError: an object without such a list, or with several.
    """
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise DataError(f"{file}: must be a JSON list of objects (found {type(value).__name__})")
    lists = [key for key, inner in value.items() if key not in _OF_A_ROW and _is_rows(inner)]
    if len(lists) == 1:
        rows: list[object] = value[lists[0]]
        return rows
    # A table that pandas wrote by columns has no text of its own.
    if not lists and (_is_lines(file) or _OF_A_ROW & value.keys() or any(isinstance(v, str) for v in value.values())):
        return [value]
    content = f"lists {', '.join(map(repr, lists))}" if lists else f"no list of objects, but {_keys_of(value)}"
    raise DataError(
        f"{file}: must be a JSON list of objects, or an object with one such list (found an object with {content}); "
        "write the rows into a file of their own: one object a line, or one list (pandas: to_json(path, "
        "orient='records', lines=True))"
    )


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)


def _keys_of(value: Mapping[str, object]) -> str:
    return some([repr(key) for key in value], most=5, kind="keys") or "nothing in it"


def _is_in_lines(file: str, first: Sequence[str]) -> bool:
    """Whether a text that is no JSON as a whole means one row a line, by its first two lines and its name."""
    if first[0].lstrip(_SPACE).startswith("["):
        return _is_value(first[0])
    return _is_lines(file) or any(map(_is_value, first))


def _is_lines(file: str) -> bool:
    return ".jsonl" in file.lower()


def _is_object(line: str) -> bool:
    return line.lstrip(_SPACE).startswith("{") and _is_value(line)


def _is_value(line: str) -> bool:
    try:
        _Parser().value(line)
    except _NotJson:
        return False
    return True


def _skip_space(text: str, begin: int) -> int:
    while begin < len(text) and text[begin] in _SPACE:
        begin += 1
    return begin


def _not_json(error: ValueError | RecursionError) -> _NotJson:
    if isinstance(error, RecursionError):
        return _NotJson("nested too deeply", "its lists and objects are nested too deeply to be read")
    if isinstance(error, json.JSONDecodeError):
        detail = f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        return _NotJson("not valid JSON", detail, error.lineno)
    return _NotJson("a number of too many digits", "holds a number of too many digits to be read")
