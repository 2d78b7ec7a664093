"""From the path of a source to its rows: which files are read, how they are packed and encoded, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import BinaryIO, cast

from ray_peft.errors import DataError, first_line
from ray_peft.foundation.substitutes import HEAD, substitute
from ray_peft.spec.base import is_local
from ray_peft.tasks.llm_sft.json_rows import json_rows
from ray_peft.tasks.llm_sft.raw import RawRow
from ray_peft.tasks.llm_sft.tables import csv_rows, parquet_rows

KINDS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
"""Endings of files that are read, in any case; all but .parquet also with .gz behind them."""

_UNPACK = {
    ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd", ".lz4": "unlz4", ".zip": "unzip", ".7z": "7z x",
    ".rar": "unrar x", ".tar": "tar xf", ".tgz": "tar xzf", ".tar.gz": "tar xzf",
}  # fmt: skip
"""Packed files that are not read, and what unpacks them."""
_OTHERS = (".txt", ".arrow", ".feather", ".ndjson", ".xlsx", ".xls", ".pkl", ".gz", ".yaml", ".sqlite", ".db")
"""More endings that mean a file, and not a hub data set."""

_MAGIC = {
    b"\x1f\x8b": ("packed by gzip", "add .gz to its name"),
    b"PAR1": ("a Parquet file", "let its name end in .parquet"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unpack it, or export its rows as CSV"),
    b"BZh": ("packed by bzip2", "unpack it with bunzip2"),
    b"\xfd7zXZ": ("packed by xz", "unpack it with unxz"),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", "unpack it with unzstd"),
    b"ARROW1": ("an Arrow file", "write it as .parquet or .jsonl"),
    b"SQLite format": ("an SQLite database", "export its rows as CSV or JSON lines"),
}
"""First bytes of what is not the text that a name promises: what it is, and the way out."""

_NO_ROWS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""Files about a data set, which lie beside its shards."""
_SPLITS = frozenset({"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval"})
_SHARD = re.compile(r"(\d+)-of-(\d+)")


def read(path: str, split: str, revision: str | None = None) -> Iterator[RawRow]:
    """The rows of a local file, of a folder of shards, or of a split of a hub data set at a `revision`.

    Raises:
        DataError: a file is missing, empty or malformed as a whole (with its line), or the hub cannot be reached.
    """
    files = local_files(path)
    if not files:
        yield from _hub_rows(path, split, revision)
        return
    empty = True
    for file in files:
        name = path if len(files) == 1 and not Path(path).expanduser().is_dir() else str(file)
        # Closed here and not by the garbage collector: a reader that stops early lets go of the file.
        with closing(_file_rows(name, file)) as rows:
            for row in rows:
                empty = False
                yield row
    if empty:
        raise DataError(f"{path}: the {'file holds' if len(files) == 1 else 'folder holds'} no rows")


def local_files(path: str) -> list[Path]:
    """The files that `path` means, in the order in which they are read; none if it is a hub data set.

    Raises:
        DataError: there is no such file, it is of an unknown kind, or a folder holds no shards or several kinds.
    """
    name = path.lower()
    file = Path(path).expanduser()
    if not is_local(path) and not name.endswith((*KINDS, *_UNPACK, *_OTHERS)) and "://" not in path and "*" not in path:
        return []
    try:
        if file.is_dir():
            return _shards(path, file)
        if not file.exists():
            raise DataError(f"{path}: no such file{_other_meaning(path, file)}")
        if not file.is_file():
            raise DataError(f"{path}: is neither a file nor a folder; save its rows in a file")
        _kind(path, file.name)
        with file.open("rb"):
            return [file]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _other_meaning(path: str, file: Path) -> str:
    """What a path that names no file may mean instead."""
    if file.is_symlink():
        return f" (a link to {file.readlink()}, which is not there)"
    if "://" in path:
        return "; this is an address: download the file, and name it"
    return "; patterns are not read: name the folder that holds the files" if "*" in path else ""


def _shards(path: str, folder: Path) -> list[Path]:
    """The shards of a folder, by name.

    Raises:
        DataError: none, several kinds, several splits, or one that is missing.
    """
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith((".", "_")))
    if "state.json" in names and "dataset_info.json" in names:
        raise DataError(
            f"{path}: is a data set saved by save_to_disk, which is not read; write it as rows: "
            "datasets.load_from_disk(FOLDER).to_parquet(FILE)"
        )
    ends = {name: _ending(name) for name in names if name.lower() not in _NO_ROWS}
    shards = {name: ending for name, ending in ends.items() if ending is not None and (folder / name).is_file()}
    missing = [name for name, ending in ends.items() if ending is not None and not (folder / name).exists()]
    if missing:
        raise DataError(f"{path}: {missing[0]} is a link to a file that is not there; mend or remove it")
    if not shards:
        inner = [name for name in names if (folder / name).is_dir()]
        below = f"; there are folders in it ({', '.join(inner[:5])}): name one of them" if inner else ""
        raise DataError(f"{path}: is a folder without files of rows ({', '.join(KINDS)}){below}")
    if len(set(shards.values())) > 1:
        kinds = ", ".join(f"{kind} ({next(name for name in shards if shards[name] == kind)})" for kind in
                          sorted(set(shards.values())))  # fmt: skip
        raise DataError(
            f"{path}: the folder holds files of several kinds: {kinds}; leave one kind in it, or name a file"
        )
    _check_shards(path, list(shards))
    for name in shards:
        _kind(str(folder / name), name)
        with (folder / name).open("rb"):
            pass
    return [folder / name for name in shards]


def _check_shards(path: str, names: list[str]) -> None:
    splits = {word for name in names if (word := re.split(r"[-_.]", name.lower())[0]) in _SPLITS}
    if len(splits) > 1:
        raise DataError(
            f"{path}: the folder holds the shards of several splits ({', '.join(sorted(splits))}), which would be "
            "mixed; name a folder with one of them, and those of the other in test_path"
        )
    numbers_by_pattern: dict[str, set[int]] = {}
    for name in names:
        if match := _SHARD.search(name):
            pattern = f"{name[: match.start()]}*-of-{match[2]}{name[match.end() :]}"
            numbers_by_pattern.setdefault(pattern, set()).add(int(match[1]))
    for pattern, numbers in numbers_by_pattern.items():
        count = int(pattern.rpartition("-of-")[2].partition(".")[0])
        missing = sorted(set(range(count)) - {number - (count in numbers) for number in numbers})
        if missing:
            raise DataError(
                f"{path}: {len(missing)} of the {count} shards {pattern} are missing; copy or download them again"
            )


def _ending(name: str) -> str | None:
    """The ending that decides how a file is read; None if by its name the file holds no rows."""
    lower = name.lower()
    return next((end for end in (*(f"{kind}.gz" for kind in KINDS), *KINDS, *_UNPACK) if lower.endswith(end)), None)


def _kind(path: str, name: str) -> str:
    """The kind of a file by its name, of KINDS.

    Raises:
        DataError: another kind, with the way out.
    """
    lower = name.lower()
    packed = next((end for end in sorted(_UNPACK, key=len, reverse=True) if lower.endswith(end)), None)
    if packed is not None:
        raise DataError(f"{path}: {packed} files are not read; unpack it (`{_UNPACK[packed]}`), or pack it with gzip")
    kind = next((kind for kind in KINDS if lower.removesuffix(".gz").endswith(kind)), None)
    if kind is None or lower.endswith(".parquet.gz"):
        endings = ", ".join(KINDS)
        raise DataError(f"{path}: unknown kind of file; known are {endings}, and all but .parquet also as .gz")
    return kind


def _file_rows(name: str, file: Path) -> Generator[RawRow]:
    """The rows of one file.

    Raises:
        DataError: it cannot be read as a whole.
    """
    kind = _kind(name, file.name)
    packed = file.name.lower().endswith(".gz")
    try:
        with file.open("rb") as content:
            _check_magic(name, content.read(HEAD), ".parquet" if kind == ".parquet" else ".gz" if packed else "")
            content.seek(0)
            if kind == ".parquet":
                yield from parquet_rows(name, file)
                return
            with gzip.open(content) if packed else content as plain:
                yield from _text_rows(name, cast(BinaryIO, plain), kind)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{name}: the gzip file is cut or damaged ({first_line(error)}); copy or download it again"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: is not {error.encoding} text, as its first bytes say, or it is cut: {error.reason}; write it "
            "again as UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None


def _text_rows(name: str, content: BinaryIO, kind: str) -> Iterator[RawRow]:
    head = content.read(4)
    if not head:
        return
    content.seek(0)
    # By the byte order mark or, without one, by where zero bytes stand in the first characters.
    encoding = json.detect_encoding(head)
    escaped = encoding.startswith("utf-8")
    is_json = kind in (".json", ".jsonl")
    with io.TextIOWrapper(
        content,
        encoding="utf-8-sig" if escaped else encoding,
        # Of UTF-8, bytes that cannot be decoded are found with their line; of UTF-16, halves of characters are a row's.
        errors="surrogateescape" if escaped else "surrogatepass",
        newline=None if is_json else "",
    ) as text:
        if is_json:
            yield from json_rows(name, text, escaped=escaped)
        else:
            yield from csv_rows(name, text, "\t" if kind == ".tsv" else ",", escaped=escaped)


def _check_magic(name: str, head: bytes, expected: str) -> None:
    """Refuse a file whose content is not what its name says.

    Raises:
        DataError: with the way out.
    """
    if head and (text := substitute(head)) is not None:
        raise DataError(f"{name}: cannot be read: it is {text}")
    actual, way = next((entry for magic, entry in _MAGIC.items() if head.startswith(magic)), ("", ""))
    if expected == ".gz":
        if head.startswith(b"\x1f\x8b") or not head:
            return
        actual, way = actual or "not packed by gzip, though its name ends in .gz", way or "take .gz from its name"
    elif expected == ".parquet" and (head.startswith(b"PAR1") or not actual):
        return
    if actual:
        raise DataError(f"{name}: cannot be read: it is {actual}; {way}")


def _hub_rows(name: str, split: str, revision: str | None) -> Iterator[RawRow]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split, revision=revision)
        for number, values in enumerate(rows, start=1):
            yield RawRow(name, number, f"row {number}", values)
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = first_line(error)
        raise DataError(f"{name}: no such local file, and it cannot be loaded as a hub data set: {reason}") from None
