"""Drawing disjoint training, validation and test rows from the files of a source."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ray_peft.errors import DataError
from ray_peft.spec import SourceSpec
from ray_peft.tasks.llm_sft import files
from ray_peft.tasks.llm_sft.conversation import Conversation, Unusable, WrongShape
from ray_peft.tasks.llm_sft.left_out import LeftOut
from ray_peft.tasks.llm_sft.raw import RawRow
from ray_peft.tasks.llm_sft.recipes import RECIPES

Ready = Callable[[Conversation], Conversation]
"""The conversation as a chat template takes it; raises Unusable if it cannot show all of it."""

_WAY_OUT = "mend or remove it, or leave such rows out with data.unusable: skip, which names them"


@dataclass(frozen=True)
class Row:
    """One usable row and where it stands."""

    file: str
    """The path of its source: a file, a folder or a hub data set."""
    number: int
    """Counted from 1 in its file; in a folder, on through its shards in the order of their names."""
    conversation: Conversation

    @property
    def place(self) -> tuple[str, int]:
        """Tells it from every other row."""
        return self.file, self.number


@dataclass(frozen=True)
class DrawnRows:
    """The rows of one source: those of its splits, and those that were left out."""

    source: str
    train: list[Row]
    """All that may be trained on, in drawing order: the first `train_count` that fit the length limit are."""
    train_count: int | None
    """None takes all that fit."""
    validation: list[Row]
    test: list[Row]
    read: int
    """Rows read from the source's files."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Unusable rows, by reason."""
    validation_dropped: int = 0
    """Validation rows left out afterwards, since they repeat a test row."""

    @property
    def unusable(self) -> Counter[str]:
        """Rows left out, by reason."""
        return self.left_out.counts


def draw(
    source: SourceSpec, seed: int, unusable: Literal["fail", "skip"] = "fail", ready: Ready | None = None
) -> DrawnRows:
    """Read a source and draw its test, validation and training rows, disjoint and in a seeded order.

    Args:
        source: where the rows are.
        seed: of the order.
        unusable: what happens to a row of another shape (see DataSpec.unusable).
        ready: the form in which a chat template takes a conversation; None takes conversations as they are.

    Raises:
        DataError: a missing or malformed file, a row of another shape, or fewer rows than asked for.
    """
    if source.test_path is not None and _same_file(source.path, source.test_path):
        raise DataError(
            f"{source.path}: source {source.label} names this file as path and as test_path, so it would be tested on "
            "rows that it trains on; leave test_path out, and the test rows are drawn apart from the training rows"
        )
    reader = _Reader(source, unusable == "skip", ready)
    pool, read = reader.usable(source.path)
    generator = random.Random(f"{seed}:{source.label}")
    generator.shuffle(pool)
    if source.test_path is None:
        held_out, held_out_read, path = pool, read, source.path
    else:
        held_out, held_out_read = reader.usable(source.test_path)
        generator.shuffle(held_out)
        path = source.test_path
    test_count = _test_count(source.test, held_out_read)
    test, rest = held_out[:test_count], pool if source.test_path else pool[test_count:]
    left_out = reader.left_out
    _check_enough(source, "test", test_count, len(held_out), path, left_out)
    validation_count = _count(source.validation, read)
    validation, train = rest[:validation_count], rest[validation_count:]
    if source.validation:
        _check_enough(source, "validation", validation_count, len(rest), source.path, left_out)
    train_count = None if source.train == 1.0 and isinstance(source.train, float) else _count(source.train, read)
    _check_enough(source, "train", 1 if train_count is None else train_count, len(train), source.path, left_out)
    _check_disjoint(source.label, {"test": test, "validation": validation, "train": train})
    read += held_out_read if source.test_path else 0
    return DrawnRows(source.label, train, train_count, validation, test, read, left_out)


class _Reader:
    """Reads the files of a source, and records the rows that cannot be used."""

    def __init__(self, source: SourceSpec, skip: bool, ready: Ready | None) -> None:
        self.source = source
        self.left_out = LeftOut()
        self._skip = skip
        self._ready = ready

    def usable(self, path: str) -> tuple[list[Row], int]:
        """The rows of a path that the source's recipe can use, and how many rows it has in all.

        Raises:
            DataError: a row of another shape, unless such rows are skipped, or no usable row.
        """
        usable: list[Row] = []
        left_out = LeftOut()
        number = 0
        revision = self.source.revision if path == self.source.path else None
        for number, raw in enumerate(files.read(path, self.source.split, revision), start=1):
            try:
                usable.append(Row(path, number, self._conversation(raw)))
            except Unusable as reason:
                left_out.add(str(reason), "" if raw.file == self.source.path else raw.file, raw.number)
        self.left_out.update(left_out)
        if not usable:
            raise DataError(
                f"{path}: source {self.source.label} is empty after filtering: recipe {self.source.recipe} can use "
                f"none of its {number} rows ({left_out.summary()}); {left_out.way_out()}"
            )
        return usable, number

    def _conversation(self, raw: RawRow) -> Conversation:
        """The conversation that the recipe makes of a row.

        Raises:
            Unusable: the row has none, for a reason that is counted.
            DataError: the row has another shape, and such rows are not skipped.
        """
        if raw.values is None:
            if self._skip:
                raise Unusable(raw.reason)
            raise DataError(f"{raw.file}: {raw.place}: {raw.detail}; {_WAY_OUT}")
        try:
            conversation = RECIPES[self.source.recipe](raw.values)
            conversation.check_characters()
            return conversation if self._ready is None else self._ready(conversation)
        except WrongShape as error:
            if self._skip:
                raise Unusable(error.reason) from None
            raise DataError(
                f"{raw.file}: {_place(raw)} does not fit recipe {self.source.recipe}: {error}; {_WAY_OUT}"
            ) from None
        except RecursionError:
            raise Unusable("nested too deeply") from None


def _place(raw: RawRow) -> str:
    row = f"row {raw.number}"
    return row if raw.place in (row, f"line {raw.number}") else f"{row} ({raw.place})"


def _same_file(first: str, second: str) -> bool:
    """Whether two paths have a file in common, perhaps as a shard of a folder, or mean one hub data set."""
    resolved = [{file.resolve() for file in files.local_files(path)} for path in (first, second)]
    return first == second or bool(resolved[0] & resolved[1])


def _test_count(amount: int | float, rows: int) -> int:
    """Test rows meant by a count or a fraction, which rounds up, as in scikit-learn's and datasets' splits."""
    return amount if isinstance(amount, int) else math.ceil(round(amount * rows, 6))


def _count(amount: int | float, rows: int) -> int:
    """Other rows meant by a count or a fraction, which rounds down, so that fractions of 1 in all fit together."""
    return amount if isinstance(amount, int) else math.floor(round(amount * rows, 6))


def _check_enough(source: SourceSpec, split: str, required: int, available: int, path: str, left_out: LeftOut) -> None:
    if required and available >= required:
        return
    if not required:
        raise DataError(
            f"{path}: source {source.label}: {split}: {getattr(source, split):g} of its rows is less than one; "
            f"raise `{split}`, or write a count{left_out.clause()}"
        )
    raise DataError(
        f"{path}: source {source.label} has {available} usable rows for {split}, but {split}: {required} are asked "
        f"for; {max(required - available, 1)} short: lower `{split}`, or give a larger file{left_out.clause()}"
    )


def _check_disjoint(source: str, splits: Mapping[str, Sequence[Row]]) -> None:
    """Check that no row was drawn twice, also under `python -O`.

    Raises:
        DataError: a row was drawn for two splits, or twice for one. That is a defect here, not in the data.
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
