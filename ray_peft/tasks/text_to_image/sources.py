"""Where images and their captions come from: a folder, or a hub data set."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ray_peft.errors import DataError, first_line
from ray_peft.spec.base import is_local
from ray_peft.spec.text_to_image import ImageDataSpec
from ray_peft.tasks.text_to_image.captions import TextFiles, caption_column, from_metadata, metadata_of, words
from ray_peft.tasks.text_to_image.listing import SUFFIXES, Listing, files_of, named, printable

_REPEATS = re.compile(r"\d+_.+")
"""A folder's name as kohya's trainer has it: how often its images are repeated, and what they show."""


@dataclass(frozen=True)
class ImageSource:
    """An image of the data, not yet opened."""

    name: str
    """Its path relative to the folder, or `row N` of a hub data set, from 1."""
    read: Callable[[], bytes]
    caption: str | None
    """None where there is none."""
    why_no_caption: str = ""
    why_not_read: str = ""
    """Of an image whose kind cannot be used; else nothing."""


@dataclass(frozen=True)
class Sources:
    """The images of the data, and remarks on other files."""

    images: list[ImageSource]
    """In the order of names or rows."""
    remarks: list[str]
    """Files beside them that are not used."""


def find(data: ImageDataSpec) -> Sources:
    """Every image of the data, with its caption.

    Raises:
        DataError: no images, metadata that is malformed or names a missing file, or a missing caption column.
    """
    if not is_local(data.path):
        return Sources(list(_hub_rows(data)), [])
    folder = Path(data.path).expanduser()
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "no such folder"
        raise DataError(f"data.path: {data.path}: {problem}; name a folder with images, or the id of a hub data set")
    listing = files_of(folder)
    if not listing.images:
        more = [*_kinds(listing), *listing.lost]
        beside = f"; not used: {named(more)}" if more else ""
        raise DataError(f"data.path: {data.path}: no images in it or below it ({', '.join(SUFFIXES)}){beside}")
    texts, metadata = TextFiles(listing), metadata_of(listing)
    if not metadata and data.caption is not None:
        raise DataError(
            f"data.caption: {data.caption}: {data.path} has neither metadata.jsonl nor metadata.csv that could "
            "have this column; write one, or leave data.caption out and put a .txt file beside each image"
        )
    captions = from_metadata(metadata, listing, data) if metadata else {}

    def caption(name: str) -> tuple[str | None, str]:
        if name in captions:
            return captions[name]
        beside, why = texts.of(name) if data.caption is None else (None, "")
        none = "no caption: no line of the metadata names it" if metadata and beside is None else why
        return beside, none

    images = [ImageSource(printable(name), path.read_bytes, *caption(name)) for name, path in listing.images.items()]
    captioned = {name: path for name, path in listing.others.items() if caption(name)[0] is not None}
    images += [
        ImageSource(printable(name), path.read_bytes, None, why_not_read=_kind(name))
        for name, path in captioned.items()
    ]
    uncaptioned = [name for name in listing.others if name not in captioned]
    return Sources(sorted(images, key=lambda image: image.name), _remarks(listing, uncaptioned, texts, bool(metadata)))


def _kind(name: str) -> str:
    return f"not read: {PurePosixPath(name).suffix.lower()} files are not; save it as PNG or JPEG"


def _kinds(listing: Listing) -> list[str]:
    return [printable(name) for name in listing.others]


def _remarks(listing: Listing, uncaptioned: list[str], texts: TextFiles, has_metadata: bool) -> list[str]:
    """Sentences on files that look like a part of the data and are not used."""
    remarks = []
    if uncaptioned:
        kinds = "of kinds that are not read, and without captions"
        remarks.append(f"not used, {kinds}: {named([printable(name) for name in uncaptioned])}")
    if listing.lost:
        remarks.append(f"not used: {named(listing.lost)}")
    orphans = [] if has_metadata else texts.without([*listing.images, *listing.others])
    if orphans:
        remarks.append(
            f"not used, text files without an image of their name: {named([printable(name) for name in orphans])}"
        )
    folders = {part for name in listing.images for part in PurePosixPath(name).parts[:-1] if _REPEATS.fullmatch(part)}
    if folders:
        names = named(sorted(printable(name) for name in folders))
        remarks.append(
            f"numbers before the names of folders ({names}) repeat nothing: each image is seen equally often"
        )
    return remarks


def _hub_rows(data: ImageDataSpec) -> Iterator[ImageSource]:
    import datasets

    try:
        rows = datasets.load_dataset(data.path, split=data.split, revision=data.revision)
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise DataError(
            f"data.path: {data.path}: no such local folder, and it cannot be loaded as a hub data set "
            f"(data.split: {data.split}): {first_line(error)}; name a folder, or check id, split and network"
        ) from None
    column = _image_column(data, rows.features)
    caption = caption_column(data, [dict.fromkeys(rows.column_names)], data.path)
    captions = rows[caption]
    rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    for index, text in enumerate(captions):
        name = f"row {index + 1}"
        yield ImageSource(name, partial(_hub_bytes, rows, column, index), *words(text, f"column {caption} of {name}"))


def _image_column(data: ImageDataSpec, features: Mapping[str, Any]) -> str:
    import datasets

    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(columns) == 1 or "image" in columns:
        return "image" if "image" in columns else columns[0]
    problem = f"has {len(columns)} columns of images ({', '.join(columns)})" if columns else "has no column of images"
    raise DataError(
        f"data.path: {data.path}: {problem}; its columns are {', '.join(features)}: use a data set with one, or with "
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
