"""Reading data files and drawing disjoint training and held-out rows from them."""

from __future__ import annotations

import gzip
import json
import math
import random
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_peft.errors import DataError
from ray_peft.spec import SourceSpec, is_local
from ray_peft.tasks.llm_sft.recipes import RECIPES, Conversation, Unusable, WrongShape

_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class DrawnRows:
    """What one source gives: conversations of both splits, and what was left out."""

    source: str
    train: list[Conversation]
    """All that may be trained on, in drawing order: the first `train_count` that fit the length limit are."""
    train_count: int | None
    """Null takes all that fit."""
    test: list[Conversation]
    read: int
    """Rows read from the source's files."""
    unusable: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""


def draw(source: SourceSpec, seed: int) -> DrawnRows:
    """Read a source and draw its training and held-out rows, disjoint and in a seeded order.

    Raises:
        DataError: a missing or malformed file, a row of another shape, or fewer rows than asked for.
    """
    unusable: Counter[str] = Counter()
    rows = list(read_rows(source.path, source.split))
    pool = _converted(source, source.path, rows, unusable)
    generator = random.Random(f"{seed}:{source.label}")
    generator.shuffle(pool)
    if source.test_path is None:
        test_count = _test_count(source.test, len(rows))
        test, rest, read = pool[:test_count], pool[test_count:], len(rows)
        available = len(pool)
    else:
        test_rows = list(read_rows(source.test_path, source.split))
        test_pool = _converted(source, source.test_path, test_rows, unusable)
        generator.shuffle(test_pool)
        test_count = _test_count(source.test, len(test_rows))
        test, rest, read = test_pool[:test_count], pool, len(rows) + len(test_rows)
        available = len(test_pool)
    if test_count == 0 or len(test) < test_count:
        raise DataError(_short_of(source, "test", test_count, available, source.test_path or source.path))
    train_count = _train_count(source.train, len(rows))
    wanted = 1 if train_count is None else train_count
    if wanted == 0 or len(rest) < wanted:
        raise DataError(_short_of(source, "train", wanted, len(rest), source.path))
    return DrawnRows(source.label, rest, train_count, test, read, unusable)


def read_rows(path: str, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a local file, or of a split of a hub data set.

    Raises:
        DataError: the file is missing, empty or malformed (with its line), or the hub cannot be reached.
    """
    plain = path.removesuffix(".gz")
    if not is_local(path) and not plain.endswith(_SUFFIXES):
        yield from _hub_rows(path, split)
        return
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{path}: no such file")
    count = 0
    for row in _file_rows(file, plain):
        count += 1
        yield row
    if not count:
        raise DataError(f"{path}: the file holds no rows")


def _file_rows(file: Path, plain: str) -> Iterator[dict[str, Any]]:
    try:
        if file.name.endswith(".parquet"):
            import pyarrow.parquet  # type: ignore[import-untyped]

            yield from pyarrow.parquet.read_table(file).to_pylist()
        elif plain.endswith(".json"):
            with _open(file) as lines:
                yield from _json_rows(file, lines.read())
        elif plain.endswith(".jsonl"):
            with _open(file) as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _json_line(file, number, line)
        else:
            raise DataError(
                f"{file}: unknown kind of file; known are {', '.join(_SUFFIXES)}, .jsonl and .json also as .gz"
            )
    except (OSError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise DataError(f"{file}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
        raise DataError(f"{file}: cannot be read: {error}") from None


def _open(file: Path) -> Any:
    return gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")


def _json_line(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: line {number}: not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise DataError(f"{file}: line {number}: must be a JSON object (found {type(row).__name__})")
    return row


def _json_rows(file: Path, content: str) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{file}: must be a JSON list of objects")
    yield from rows


def _hub_rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name}: no such local file, and it cannot be loaded as a hub data set: {reason}") from None


def _converted(source: SourceSpec, path: str, rows: list[dict[str, Any]], unusable: Counter[str]) -> list[Conversation]:
    recipe = RECIPES[source.recipe]
    conversations = []
    for number, row in enumerate(rows, start=1):
        try:
            conversations.append(recipe(row))
        except WrongShape as error:
            raise DataError(f"{path}: row {number} does not fit recipe {source.recipe}: {error}") from None
        except Unusable as reason:
            unusable[str(reason)] += 1
    return conversations


def _test_count(asked: int | float, rows: int) -> int:
    """Held-out rows meant by a count or a fraction, which rounds up, as in scikit-learn's and datasets' splits."""
    return asked if isinstance(asked, int) else math.ceil(round(asked * rows, 6))


def _train_count(asked: int | float, rows: int) -> int | None:
    """Training rows meant by a count or a fraction, which rounds down; null means all but the held-out rows."""
    if isinstance(asked, int):
        return asked
    return None if asked == 1.0 else math.floor(round(asked * rows, 6))


def _short_of(source: SourceSpec, split: str, asked: int, available: int, path: str) -> str:
    return (
        f"{path}: source {source.label} has {available} usable rows for {split}, but {split}: {asked} are asked for; "
        f"{max(asked - available, 1)} short: lower `{split}`, or give a larger file"
    )
