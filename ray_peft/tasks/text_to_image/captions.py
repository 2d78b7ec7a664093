"""Captions of the images of a folder: from metadata.jsonl or metadata.csv, or from a text file beside each image."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ray_peft.errors import DataError
from ray_peft.spec.text_to_image import ImageDataSpec
from ray_peft.tasks.text_to_image.listing import NOT_READ, SUFFIXES, Listing, named, plain_name, printable

Caption = tuple[str | None, str]
"""A caption, or None and why there is none."""

ENDINGS = (".txt", ".caption")
"""Text files that hold captions, the first one first."""

_COLUMNS = ("text", "caption")
_METADATA = ("metadata.jsonl", "metadata.csv")
_DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}


@dataclass(frozen=True)
class _Line:
    """One line of a metadata file."""

    file: Path
    number: int
    values: Mapping[str, Any]

    @property
    def place(self) -> str:
        return f"{self.file.name} line {self.number}"


class TextFiles:
    """The text files of a folder, each the caption of the image that it is named after."""

    def __init__(self, listing: Listing) -> None:
        self._files: dict[str, Path] = {}
        for name, path in listing.files.items():
            stem, ending = posixpath.splitext(name)
            if ending.lower() in ENDINGS:
                self._files.setdefault(plain_name(stem) + ending.lower(), path)

    def of(self, image: str) -> Caption:
        """The caption of an image: that of `a.png` stands in a.txt, a.caption, a.png.txt or a.png.caption."""
        name = self._named_after(image)
        if name is None:
            return None, f"no caption: no {printable(PurePosixPath(image).stem)}.txt beside it"
        file = self._files[name]
        try:
            return words(text_of(file), printable(file.name))
        except (OSError, UnicodeError) as error:
            return None, f"no caption: {printable(file.name)} {not_text(error)}"

    def without(self, images: Iterable[str]) -> list[str]:
        """The names of text files that belong to none of the images."""
        names = {name for image in images for name in self._candidates(image)}
        return [path.name for name, path in self._files.items() if name not in names]

    def _named_after(self, image: str) -> str | None:
        return next((name for name in self._candidates(image) if name in self._files), None)

    @staticmethod
    def _candidates(image: str) -> list[str]:
        stems = (plain_name(posixpath.splitext(image)[0]), plain_name(image))
        return [stem + ending for stem in stems for ending in ENDINGS]


def words(value: object, place: str) -> Caption:
    """A caption without line ends and doubled blanks, or why it is none."""
    if value is None:
        return None, f"no caption: null in {place}"
    if not isinstance(value, str):
        return None, f"no caption: {type(value).__name__} in place of text in {place}"
    text = " ".join(value.split())
    for character in text:
        if character == "\0":
            return None, f"no caption: a NUL character in {place}, which is no text"
        if unicodedata.category(character) == "Cs":
            half = f"half of a character (the surrogate U+{ord(character):04X})"
            return None, f"no caption: {half} in {place}, which is no text"
    # Characters of no width alone are as blank as blanks.
    if not any(unicodedata.category(character)[0] in "LMNPS" for character in text):
        return None, f"no caption: blank in {place}"
    return text, ""


def text_of(file: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with its byte order mark.

    Raises:
        UnicodeError: it is neither.
        OSError: it cannot be read.
    """
    content = file.read_bytes()
    return content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")


def not_text(error: OSError | UnicodeError) -> str:
    """Why a file has no text, and the way out."""
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    at = f"{error.reason} at byte {error.start}" if isinstance(error, UnicodeDecodeError) else str(error)
    return f"is not {'UTF-16' if 'utf-16' in str(error) else 'UTF-8'} text ({at}); save it as UTF-8"


def metadata_of(listing: Listing) -> list[Path]:
    """The metadata files of a folder and of those below: all .jsonl files, or else all .csv files."""
    files = [[path for path in listing.files.values() if path.name.lower() == name] for name in _METADATA]
    return next(filter(None, files), [])


def from_metadata(files: Sequence[Path], listing: Listing, data: ImageDataSpec) -> dict[str, Caption]:
    """The caption of each image that the metadata names, or why it has none.

    Raises:
        DataError: the metadata cannot be used.
    """
    everything = [line for file in files for line in _lines(file)]
    column = caption_column(data, (line.values for line in everything), ", ".join(str(file) for file in files))
    finder = _Finder(listing)
    captions: dict[str, Caption] = {}
    first: dict[str, str] = {}
    problems = []
    for line in everything:
        name, problem = finder.image(line)
        if name in first:
            problem = f"{line.place} names {name} again, after {first[name]}"
        if problem:
            problems.append(problem)
            continue
        first[name] = line.place
        captions[name] = words(line.values.get(column), f"column {column} of {line.place}")
    if problems:
        raise DataError(
            f"data.path: {data.path}: {named(problems)}; add what is missing, or remove these lines from the metadata"
        )
    return captions


class _Finder:
    """Finds the images that lines of metadata mean."""

    def __init__(self, listing: Listing) -> None:
        self._folder = listing.folder
        self._images = {**listing.images, **listing.others}
        self._composed = {plain_name(name): name for name in reversed(self._images)}
        self._any_case = {name.casefold(): name for name in self._composed}

    def image(self, line: _Line) -> tuple[str, str]:
        """The image that a line means, by its name in the listing, and what is wrong with the line, if anything."""
        name = line.values.get("file_name")
        if not isinstance(name, str) or not name.strip():
            return "", f"{line.place} has no file_name"
        names = [self._relative(line.file, spelling) for spelling in _spellings(name)]
        for candidate in names:
            if candidate in self._images or plain_name(candidate) in self._composed:
                return candidate if candidate in self._images else self._composed[plain_name(candidate)], ""
        return names[0], f"{line.place} names {name}, {self._why_unusable(line.file.parent / name, names)}"

    def _relative(self, file: Path, name: str) -> str:
        """A name relative to the folder, of one that is relative to its metadata file, or absolute."""
        return posixpath.relpath(posixpath.join(file.parent.as_posix(), name), self._folder.as_posix())

    def _why_unusable(self, path: Path, names: Sequence[str]) -> str:
        try:
            exists = path.exists()
        except (OSError, ValueError):  # too long for a name, or a NUL in it
            exists = False
        if not exists:
            near = next(filter(None, (self._any_case.get(plain_name(name).casefold()) for name in names)), None)
            return "which is not there" + (f" (there is {near}: the case of letters counts)" if near else "")
        if not path.name.lower().endswith((*SUFFIXES, *NOT_READ)):
            return f"which is no image of a known kind ({', '.join(SUFFIXES)})"
        return "which is hidden or outside of the folder"


def _spellings(name: str) -> list[str]:
    """A file's name as it was given, without blanks around it, and with the slashes of other systems than Windows."""
    return list(dict.fromkeys((name, name.strip(), name.strip().replace("\\", "/"))))


def caption_column(data: ImageDataSpec, rows: Iterable[Mapping[str, Any]], where: str) -> str:
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
    for column in _COLUMNS:
        if column in columns:
            return column
    raise DataError(
        f"data.caption: {where} has no column text or caption; its columns are {listed}: name the one with captions"
    )


def _text(file: Path) -> str:
    try:
        return text_of(file)
    except (OSError, UnicodeError) as error:
        raise DataError(f"data.path: {file}: {not_text(error)}") from None


def _lines(file: Path) -> Iterator[_Line]:
    return _csv_lines(file) if file.suffix.lower() == ".csv" else _json_lines(file)


def _json_lines(file: Path) -> Iterator[_Line]:
    text = _text(file)
    if (array := _array(text)) is not None:
        yield from (_Line(file, number, values) for number, values in enumerate(array, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
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


def _array(text: str) -> list[dict[str, Any]] | None:
    """The objects of one JSON array in place of lines; None if it is something else."""
    if not text.lstrip().startswith("["):
        return None
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        return None
    return values if all(isinstance(value, dict) for value in values) else None


def _csv_lines(file: Path) -> Iterator[_Line]:
    text = _text(file)
    delimiter, header = _header(file, text)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        next(rows, None)
        for values in rows:
            if not values:
                continue
            if len(values) != len(header):
                raise DataError(
                    f"data.path: {file}: line {rows.line_num} has {len(values)} values for {len(header)} columns; put "
                    f"text that holds {_DELIMITERS[delimiter]} in double quotes"
                )
            yield _Line(file, rows.line_num, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise DataError(f"data.path: {file}: line {rows.line_num}: not valid CSV: {error}; mend the line") from None


def _header(file: Path, text: str) -> tuple[str, list[str]]:
    """What stands between two values of a line, and the names of the columns.

    Raises:
        DataError: no column is called file_name, or two columns have one name.
    """
    lines = text.splitlines()
    headers = {delimiter: _cells(lines[0] if lines else "", delimiter) for delimiter in _DELIMITERS}
    delimiter = next((delimiter for delimiter, header in headers.items() if "file_name" in header), ",")
    header = headers[delimiter]
    if "file_name" not in header:
        raise DataError(
            f"data.path: {file}: line 1 names the columns, and file_name must be one of them "
            f"(found {', '.join(header) or 'none'})"
        )
    if double := [name for name in header if header.count(name) > 1]:
        raise DataError(f"data.path: {file}: line 1 names the column {double[0]} twice; rename one of them")
    return delimiter, header


def _cells(line: str, delimiter: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []
