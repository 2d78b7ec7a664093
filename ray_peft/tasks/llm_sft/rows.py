"""Reading data files and drawing disjoint training, validation and test rows from them."""

from __future__ import annotations

import gzip
import json
import math
import random
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_peft.errors import DataError, first_line
from ray_peft.spec import SourceSpec, is_local
from ray_peft.tasks.llm_sft.recipes import RECIPES, Conversation, Unusable, WrongShape

_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Row:
    """One usable row and where it stands."""

    file: str
    number: int
    """Counted from 1 in its file."""
    conversation: Conversation

    @property
    def place(self) -> tuple[str, int]:
        """Tells it from every other row."""
        return self.file, self.number


@dataclass(frozen=True)
class DrawnRows:
    """What one source gives: the rows of its splits, and what was left out."""

    source: str
    train: list[Row]
    """All that may be trained on, in drawing order: the first `train_count` that fit the length limit are."""
    train_count: int | None
    """Null takes all that fit."""
    validation: list[Row]
    test: list[Row]
    read: int
    """Rows read from the source's files."""
    unusable: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""
    validation_dropped: int = 0
    """Validation rows left out afterwards, since they repeat a test row."""


def draw(source: SourceSpec, seed: int) -> DrawnRows:
    """Read a source and draw its test, validation and training rows, disjoint and in a seeded order.

    Raises:
        DataError: a missing or malformed file, a row of another shape, or fewer rows than asked for.
    """
    if source.test_path is not None and _same_file(source.path, source.test_path):
        raise DataError(
            f"{source.path}: source {source.label} names this file as path and as test_path, so it would be tested on "
            "rows that it trains on; leave test_path out, and the test rows are drawn apart from the training rows"
        )
    unusable: Counter[str] = Counter()
    pool, read = _usable(source, source.path, unusable)
    generator = random.Random(f"{seed}:{source.label}")
    generator.shuffle(pool)
    if source.test_path is None:
        held_out, held_out_read, path = pool, read, source.path
    else:
        held_out, held_out_read = _usable(source, source.test_path, unusable)
        generator.shuffle(held_out)
        path = source.test_path
    test_count = _test_count(source.test, held_out_read)
    test, rest = held_out[:test_count], pool if source.test_path else pool[test_count:]
    _check_enough(source, "test", test_count, len(held_out), path)
    validation_count = _count(source.validation, read)
    validation, train = rest[:validation_count], rest[validation_count:]
    if source.validation:
        _check_enough(source, "validation", validation_count, len(rest), source.path)
    train_count = None if source.train == 1.0 and isinstance(source.train, float) else _count(source.train, read)
    _check_enough(source, "train", 1 if train_count is None else train_count, len(train), source.path)
    _check_disjoint(source.label, {"test": test, "validation": validation, "train": train})
    read += held_out_read if source.test_path else 0
    return DrawnRows(source.label, train, train_count, validation, test, read, unusable)


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
        reason = first_line(error)
        raise DataError(f"{name}: no such local file, and it cannot be loaded as a hub data set: {reason}") from None


def _usable(source: SourceSpec, path: str, unusable: Counter[str]) -> tuple[list[Row], int]:
    """The rows of a file that its recipe can use, and how many rows it has in all.

    Raises:
        DataError: a row of another shape, or no usable row.
    """
    recipe = RECIPES[source.recipe]
    usable: list[Row] = []
    reasons: Counter[str] = Counter()
    number = 0
    for number, row in enumerate(read_rows(path, source.split), start=1):
        try:
            usable.append(Row(path, number, recipe(row)))
        except WrongShape as error:
            raise DataError(f"{path}: row {number} does not fit recipe {source.recipe}: {error}") from None
        except Unusable as reason:
            reasons[str(reason)] += 1
    if not usable:
        why = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
        raise DataError(
            f"{path}: source {source.label} is empty after filtering: recipe {source.recipe} can use none of its "
            f"{number} rows ({why}); check that the recipe suits the file"
        )
    unusable.update(reasons)
    return usable, number


def _same_file(one: str, other: str) -> bool:
    return one == other or (is_local(one) and is_local(other) and Path(one).resolve() == Path(other).resolve())


def _test_count(asked: int | float, rows: int) -> int:
    """Test rows meant by a count or a fraction, which rounds up, as in scikit-learn's and datasets' splits."""
    return asked if isinstance(asked, int) else math.ceil(round(asked * rows, 6))


def _count(asked: int | float, rows: int) -> int:
    """Other rows meant by a count or a fraction, which rounds down, so that fractions of 1 in all fit together."""
    return asked if isinstance(asked, int) else math.floor(round(asked * rows, 6))


def _check_enough(source: SourceSpec, split: str, asked: int, available: int, path: str) -> None:
    if asked and available >= asked:
        return
    if not asked:
        raise DataError(
            f"{path}: source {source.label}: {split}: {getattr(source, split):g} of its rows is less than one; "
            f"raise `{split}`, or write a count"
        )
    raise DataError(
        f"{path}: source {source.label} has {available} usable rows for {split}, but {split}: {asked} are asked for; "
        f"{max(asked - available, 1)} short: lower `{split}`, or give a larger file"
    )


def _check_disjoint(source: str, splits: Mapping[str, Sequence[Row]]) -> None:
    """Hold the drawing to its promise, also under `python -O`.

    Raises:
        DataError: a row was drawn for two splits, or twice for one: a defect here, not in the data.
    """
    drawn: dict[tuple[str, int], str] = {}
    for split, rows in splits.items():
        for row in rows:
            if row.place in drawn:
                file, number = row.place
                raise DataError(
                    f"{file}: row {number} of source {source} was drawn for {drawn[row.place]} and again for {split}, "
                    "but no row may be drawn twice; this is a defect of ray_peft and not of the data: please report it"
                )
            drawn[row.place] = split
