"""Where images and their captions come from: a folder, or a hub data set."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ray_peft.errors import DataError, first_line
from ray_peft.spec.base import is_local
from ray_peft.spec.text_to_image import ImageDataSpec

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""Files with these endings are images, in any case."""

NAMED_AT_MOST = 20
"""Files that one message names; the others are counted."""

_CAPTION_COLUMNS = ("text", "caption")
_METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Found:
    """An image that is there, not yet opened."""

    name: str
    """Its path relative to the folder, or `row N` of a hub data set, from 1."""
    read: Callable[[], bytes]
    caption: str | None
    """Null where there is none."""
    why_no_caption: str = ""


@dataclass(frozen=True)
class _Line:
    """One line of a metadata file."""

    file: Path
    number: int
    values: Mapping[str, Any]

    @property
    def place(self) -> str:
        return f"{self.file.name} line {self.number}"


def find(data: ImageDataSpec) -> list[Found]:
    """Every image of the data, with its caption, in the order of names or rows.

    Raises:
        DataError: no images, metadata that is malformed or names a missing file, or a missing caption column.
    """
    if not is_local(data.path):
        return list(_hub_rows(data))
    folder = Path(data.path).expanduser()
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise DataError(f"data.path: {data.path}: {what}; name a folder with images, or the id of a hub data set")
    files = {path.relative_to(folder).as_posix(): path for path in _visible_files(folder)}
    images = {name: path for name, path in files.items() if name.lower().endswith(SUFFIXES)}
    if not images:
        raise DataError(f"data.path: {data.path}: no images in it or below it ({', '.join(SUFFIXES)})")
    metadata = next(filter(None, ([file for file in files.values() if file.name == name] for name in _METADATA)), None)
    captions = None if metadata is None else _captions_from_metadata(metadata, folder, images, data)
    if captions is None:
        if data.caption is not None:
            raise DataError(
                f"data.caption: {data.caption}: {data.path} has neither metadata.jsonl nor metadata.csv that could "
                "have this column; write one, or leave data.caption out and put a .txt file beside each image"
            )
        captions = {name: _caption_beside(path) for name, path in images.items()}
    return [
        Found(name, path.read_bytes, *captions.get(name, (None, "no caption: no line of the metadata names it")))
        for name, path in sorted(images.items())
    ]


def named(parts: Sequence[str]) -> str:
    """The parts as a list with commas; the first ones, if there are many."""
    more = f" and {len(parts) - NAMED_AT_MOST} more" if len(parts) > NAMED_AT_MOST else ""
    return ", ".join(parts[:NAMED_AT_MOST]) + more


def _visible_files(folder: Path) -> Iterator[Path]:
    """The files in and below a folder, without hidden ones (such as the `._name` files of macOS)."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent) / name for name in sorted(names) if not name.startswith("."))


def _caption_beside(image: Path) -> tuple[str | None, str]:
    """The caption in the .txt file of the same stem, or why there is none."""
    file = image.with_suffix(".txt")
    try:
        return _words(file.read_text(encoding="utf-8-sig"), file.name)
    except FileNotFoundError:
        return None, f"no caption: no {file.name} beside it"
    except UnicodeDecodeError as error:
        return None, f"no caption: {file.name} is not UTF-8 text ({error.reason} at byte {error.start})"


def _words(value: object, place: str) -> tuple[str | None, str]:
    """A caption without line ends and doubled blanks, or why it is none."""
    if value is None:
        return None, f"no caption: null in {place}"
    if not isinstance(value, str):
        return None, f"no caption: {type(value).__name__} in place of text in {place}"
    text = " ".join(value.split())
    return (text, "") if text else (None, f"no caption: blank in {place}")


def _captions_from_metadata(
    files: Sequence[Path], folder: Path, images: Mapping[str, Path], data: ImageDataSpec
) -> dict[str, tuple[str | None, str]]:
    """The caption of each image that the metadata names, or why it has none.

    Raises:
        DataError: the metadata cannot be used.
    """
    everything = [line for file in files for line in (_csv_lines if file.suffix == ".csv" else _json_lines)(file)]
    column = _caption_column(data, (line.values for line in everything), ", ".join(str(file) for file in files))
    captions: dict[str, tuple[str | None, str]] = {}
    first: dict[str, str] = {}
    problems = []
    for line in everything:
        name, problem = _image_named(line, folder, images)
        if name in first:
            problem = f"{line.place} names {name} again, after {first[name]}"
        if problem:
            problems.append(problem)
            continue
        first[name] = line.place
        captions[name] = _words(line.values.get(column), f"column {column} of {line.place}")
    if problems:
        raise DataError(
            f"data.path: {data.path}: {named(problems)}; add what is missing, or remove these lines from the metadata"
        )
    return captions


def _image_named(line: _Line, folder: Path, images: Mapping[str, Path]) -> tuple[str, str]:
    """The image that a line means, by its name relative to `folder`, and what is wrong with the line, if anything."""
    given = line.values.get("file_name")
    if not isinstance(given, str) or not given:
        return "", f"{line.place} has no file_name"
    beside = PurePosixPath(line.file.parent.relative_to(folder).as_posix())
    name = str(beside / given)
    if name in images:
        return name, ""
    path = line.file.parent / given
    if not path.exists():
        return name, f"{line.place} names {given}, which is not there"
    if not given.lower().endswith(SUFFIXES):
        return name, f"{line.place} names {given}, which is no image of a known kind ({', '.join(SUFFIXES)})"
    return name, f"{line.place} names {given}, which is hidden or outside of the folder"


def _caption_column(data: ImageDataSpec, rows: Iterable[Mapping[str, Any]], where: str) -> str:
    """The column with captions.

    Raises:
        DataError: it is not there.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if data.caption in columns:
        return str(data.caption)
    listed = ", ".join(columns) or "none"
    if data.caption is not None:
        raise DataError(f"data.caption: {data.caption}: no such column in {where}; its columns are {listed}")
    for column in _CAPTION_COLUMNS:
        if column in columns:
            return column
    raise DataError(
        f"data.caption: {where} has no column text or caption; its columns are {listed}: name the one with captions"
    )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text: {error.reason} at byte {error.start}"
        raise DataError(f"data.path: {file}: {reason}; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"data.path: {file}: cannot be read: {error.strerror or error}") from None


def _json_lines(file: Path) -> Iterator[_Line]:
    for number, line in enumerate(_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"data.path: {file}: line {number}: not valid JSON: {error.msg} at column {error.colno}; write one "
                "object a line, with file_name and text"
            ) from None
        if not isinstance(values, dict):
            raise DataError(
                f"data.path: {file}: line {number}: must be a JSON object with file_name and text "
                f"(found {type(values).__name__})"
            )
        yield _Line(file, number, values)


def _csv_lines(file: Path) -> Iterator[_Line]:
    rows = csv.reader(_text(file).splitlines(keepends=True))
    header = next(rows, [])
    if "file_name" not in header:
        raise DataError(
            f"data.path: {file}: line 1 names the columns, and file_name must be one of them "
            f"(found {', '.join(header) or 'none'})"
        )
    try:
        for values in rows:
            if not values:
                continue
            if len(values) != len(header):
                raise DataError(
                    f"data.path: {file}: line {rows.line_num} has {len(values)} values for {len(header)} columns; put "
                    "text that holds a comma in double quotes"
                )
            yield _Line(file, rows.line_num, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise DataError(f"data.path: {file}: line {rows.line_num}: not valid CSV: {error}; mend the line") from None


def _hub_rows(data: ImageDataSpec) -> Iterator[Found]:
    import datasets

    try:
        rows = datasets.load_dataset(data.path, split=data.split)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise DataError(
            f"data.path: {data.path}: no such local folder, and it cannot be loaded as a hub data set "
            f"(data.split: {data.split}): {first_line(error)}; name a folder, or check id, split and network"
        ) from None
    column = _image_column(data, rows.features)
    caption = _caption_column(data, [dict.fromkeys(rows.column_names)], data.path)
    captions = rows[caption]
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    for index, given in enumerate(captions):
        name = f"row {index + 1}"
        yield Found(name, partial(_hub_bytes, rows, column, index), *_words(given, f"column {caption} of {name}"))


def _image_column(data: ImageDataSpec, features: Mapping[str, Any]) -> str:
    import datasets

    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(columns) == 1 or "image" in columns:
        return "image" if "image" in columns else columns[0]
    found = f"has {len(columns)} columns of images ({', '.join(columns)})" if columns else "has no column of images"
    raise DataError(
        f"data.path: {data.path}: {found}; its columns are {', '.join(features)}: use a data set with one, or with "
        "one that is called image"
    )


def _hub_bytes(rows: Any, column: str, index: int) -> bytes:
    """The encoded image of a row.

    Raises:
        OSError: it is kept in a file that cannot be read, or there is none.
    """
    cell = rows[index][column]
    if cell is None:
        raise OSError("the row has no image")
    content: bytes | None = cell["bytes"]
    return Path(cell["path"]).read_bytes() if content is None else content
