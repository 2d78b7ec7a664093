"""Rows from tables: comma- or tab-separated text with a header, and Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TextIO

from ray_peft.errors import DataError, first_line
from ray_peft.foundation.lists import first_duplicate
from ray_peft.tasks.llm_sft.raw import NOT_UTF8, RawRow, undecodable, unreadable

_LONGEST_FIELD = 2**31 - 1
"""Characters of a field of a CSV file: the most that the csv module takes on every system; its default is 131,072."""
_BATCH = 1024


def csv_rows(file: str, text: TextIO, delimiter: str, *, escaped: bool) -> Iterator[RawRow]:
    """The rows below a header; every field is text, as it stands.

    Args:
        file: its name, for messages.
        text: opened with newline="".
        delimiter: what stands between fields; a header without a comma may have semicolons or tabs instead.
        escaped: whether bytes that are not UTF-8 stand in it as surrogates.

    Raises:
        DataError: a header that names no or equal columns, or a quotation mark that is not closed.
    """
    above, first = 0, text.readline()
    while first and not first.strip():
        above, first = above + 1, text.readline()
    if delimiter == "," and "," not in first:
        delimiter = next((candidate for candidate in (";", "\t") if candidate in first), delimiter)
    longest = csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(chain([first], text), delimiter=delimiter, strict=True)
    number, begin = 0, above
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_header(f"{file}: line {above + 1}", header, escaped)
        begin = above + reader.line_num
        for fields in reader:
            if fields:
                number += 1
                yield _csv_row(file, number, f"line {begin + 1}", header, fields, escaped)
            begin = above + reader.line_num
    except csv.Error as error:
        raise DataError(
            f"{file}: line {begin + 1}: not valid CSV: {error}; put fields with quotation marks into quotation marks, "
            "and double those inside"
        ) from None
    finally:
        csv.field_size_limit(longest)


def _check_header(place: str, header: Sequence[str], escaped: bool) -> None:
    problem = next(filter(None, map(undecodable, header)), None) if escaped else None
    if problem is not None:
        raise DataError(f"{place}: {problem}")
    duplicate = first_duplicate(header)
    if duplicate is not None or (header and "" in header):
        fault = f"names column {duplicate!r} twice" if duplicate else "has a column without a name"
        raise DataError(f"{place}: the header {fault}; give every column a name of its own")


def _csv_row(file: str, number: int, place: str, header: Sequence[str], fields: Sequence[str], escaped: bool) -> RawRow:
    problem = next(filter(None, map(undecodable, fields)), None) if escaped else None
    if problem is not None:
        return unreadable(file, number, place, NOT_UTF8, problem)
    if len(fields) != len(header):
        detail = f"has {len(fields)} fields, but the header has {len(header)}; put fields that hold the separator into "
        return unreadable(file, number, place, "another number of fields than the header", f"{detail}quotation marks")
    return RawRow(file, number, place, dict(zip(header, fields, strict=True)))


def parquet_rows(file: str, path: Path) -> Iterator[RawRow]:
    """The rows of a Parquet file.

    Raises:
        DataError: it is cut, is no Parquet file, or names a column twice.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            duplicate = first_duplicate(table.schema_arrow.names)
            if duplicate is not None:
                raise DataError(f"{file}: has column {duplicate!r} twice; give every column a name of its own")
            for batch in table.iter_batches(batch_size=_BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(file, number, f"row {number}", values)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: behind row {number}: holds text that is not UTF-8 ({error.reason}); write the file again"
        ) from None
    except (pa.ArrowException, OSError, ValueError, KeyError, NotImplementedError) as error:
        raise DataError(
            f"{file}: cannot be read: cut, damaged, or no Parquet file ({first_line(error)}); copy or download it again"
        ) from None
