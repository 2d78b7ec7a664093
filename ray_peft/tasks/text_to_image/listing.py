"""The files in and below a folder of images, by the names that metadata and captions use."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_peft.errors import DataError
from ray_peft.foundation.lists import some

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jfif", ".jpe", ".apng", ".dib",
    ".jp2",
)  # fmt: skip
"""Files with these endings are images, in any case."""

NOT_READ = (
    ".heic", ".heif", ".jxl", ".svg", ".psd", ".xcf", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".ico", ".qoi", ".pcx",
    ".dds", ".exr", ".hdr", ".jxr", ".j2k", ".jpx", ".eps", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2",
    ".raf",
)  # fmt: skip
"""Files with these endings are images, too, but of kinds that cannot be trained on as they are."""

NAMED_AT_MOST = 20
"""Files that one message names; the others are counted."""


@dataclass(frozen=True)
class Listing:
    """The visible files of a folder."""

    folder: Path
    files: Mapping[str, Path]
    """By their paths relative to the folder, with slashes; linked folders are looked into."""
    lost: Sequence[str]
    """Links that were not followed, each with the reason."""

    @property
    def images(self) -> dict[str, Path]:
        """Those that are read."""
        return self._ending(SUFFIXES)

    @property
    def others(self) -> dict[str, Path]:
        """Images of kinds that are not read."""
        return self._ending(NOT_READ)

    def _ending(self, endings: tuple[str, ...]) -> dict[str, Path]:
        return {name: path for name, path in self.files.items() if name.lower().endswith(endings)}


def files_of(folder: Path) -> Listing:
    """The files in and below a folder, without hidden ones (such as the `._name` files of macOS).

    Raises:
        DataError: a folder cannot be read.
    """
    files: dict[str, Path] = {}
    lost: list[str] = []
    visited: set[str] = set()
    waiting = [folder]
    while waiting:
        links = _walk(waiting.pop(0), folder, files, lost, visited)
        for link in links:
            target = os.path.realpath(link)
            if _is_in(os.path.realpath(folder), target):
                lost.append(f"{link.relative_to(folder).as_posix()} (a link to a folder that it lies in)")
            elif target not in visited:
                waiting.append(link)
    return Listing(folder, dict(sorted(files.items())), lost)


def _walk(top: Path, folder: Path, files: dict[str, Path], lost: list[str], visited: set[str]) -> list[Path]:
    """Add the files in and below `top` that were not `visited`; returns the linked folders, which are not entered."""

    def refuse(error: OSError) -> None:
        raise DataError(f"data.path: {error.filename}: cannot be read: {error.strerror}; mend its permissions")

    links = []
    for parent, folders, names in os.walk(top, onerror=refuse):
        real = os.path.realpath(parent)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if real not in visited else []
        if real in visited:
            continue
        visited.add(real)
        links += [path for path in (Path(parent) / name for name in folders) if path.is_symlink()]
        for path in (Path(parent) / name for name in sorted(names) if not name.startswith(".")):
            name = path.relative_to(folder).as_posix()
            if path.exists():
                files[name] = path
            else:
                lost.append(f"{printable(name)} (a link that leads nowhere)")
    return links


def _is_in(inner: str, outer: str) -> bool:
    return Path(inner).is_relative_to(outer)


def plain_name(name: str) -> str:
    """A name in Unicode's composed form (NFC): macOS writes e and an accent where others write one letter."""
    return unicodedata.normalize("NFC", name)


def printable(name: str) -> str:
    """A file's name as it can be written in UTF-8: bytes that are no text become escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def named(parts: Sequence[str]) -> str:
    """The parts as a list with commas; the first ones, if there are many."""
    return some(parts, NAMED_AT_MOST)
