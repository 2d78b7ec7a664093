"""The content of a model's folder, read without the libraries that load it: whether a check of it still holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ray_peft.spec import ModelSpec, is_local
from ray_peft.tasks.files import content_of

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
"""Endings of files that may be too large to be read at every start."""

WHOLE = 256 * 2**20
"""Weights of at most these bytes together are read whole; of larger ones, samples."""

SAMPLE = 2**20
"""Bytes at the start, in the middle and at the end of a file that is not read whole."""


def folder_of(name: str, revision: str | None, file: str) -> Path | None:
    """A model's folder; for a hub id, the local copy of the commit that `revision` names now. None if there is none.

    Args:
        name: a folder, or a hub id.
        revision: of a hub id; None is its main branch.
        file: that every such model holds.
    """
    if is_local(name):
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file, revision=revision)).parent
    except Exception:  # the hub client raises a dozen unrelated types; who loads the model says why
        return None


def snapshot(name: str, revision: str | None) -> Path | None:
    """The local copy of a hub model, as far as it is downloaded; None if nothing of it is here."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:  # the hub client raises a dozen unrelated types
        return None


def commit_of(model: ModelSpec) -> str | None:
    """The commit of a hub model that this machine has read last; None if it is a folder, or nothing of it is here."""
    folder = None if is_local(model.name) else snapshot(model.name, model.revision)
    return None if folder is None else folder.name


def content(folder: Path, below: Iterable[str] = ()) -> str:
    """Digest of a folder's files by name: content, and of weights also size and time.

    Args:
        folder: of the model; folders in it are skipped.
        below: names of folders in it that are read, too.
    """
    files = sorted(file for place in (folder, *(folder / name for name in below)) for file in _files(place))
    read_whole = sum(file.stat().st_size for file in files if file.suffix in WEIGHTS) <= WHOLE
    digest = hashlib.sha256(str(folder.absolute()).encode())
    for file in files:
        digest.update(f"\n{file.relative_to(folder).as_posix()}:".encode())
        if file.suffix in WEIGHTS:
            stat = file.stat()
            digest.update(f"{stat.st_size}:{stat.st_mtime_ns}:".encode())
        sampled = file.suffix in WEIGHTS and not read_whole
        digest.update(_sampled(file) if sampled else content_of(file).encode())
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []


def _sampled(file: Path) -> bytes:
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        for begin in (0, size // 2, max(0, size - SAMPLE)):
            opened.seek(begin)
            digest.update(opened.read(SAMPLE))
    return digest.digest()
