"""A model's weight files: which ones are read, and the names, shapes and bytes of the weights in them."""

from __future__ import annotations

import hashlib
import json
import mmap
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.errors import ModelError, first_line
from ray_peft.foundation.lists import some
from ray_peft.foundation.substitutes import substitute_in
from ray_peft.tasks import safetensors_header
from ray_peft.tasks.safetensors_header import Entry

if TYPE_CHECKING:
    from torch import Tensor

WHOLE = 256 * 2**20
"""Files of at most these bytes together are read whole where content counts; of larger ones, samples of each weight."""

SAMPLE = 4096
"""Bytes of a sample: one at the start, the middle and the end of each weight."""


@dataclass(frozen=True)
class WeightFiles:
    """The files that transformers reads for a model, in its order."""

    files: tuple[Path, ...]
    variant: str | None = None
    """Such as fp16, where only files of that variant are there."""
    index: Path | None = None
    """The file that names the shards, if there is one."""

    @property
    def pickled(self) -> bool:
        """Whether they are torch's own archives, which are read without running code from them."""
        return self.files[0].suffix == ".bin"

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(file.stat().st_size for file in self.files)

    def stamps(self) -> tuple[tuple[str, int, int], ...]:
        """Paths, times and sizes, which change if a file changes."""
        every = [*self.files, *([self.index] if self.index else [])]
        return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in every)


def weight_files(folder: Path, named: str | None = None) -> WeightFiles:
    """The files that transformers 5.23 would load from `folder`.

    Args:
        folder: of the model.
        named: `transformers_weights` of its config, which names one file or index.

    Raises:
        ModelError: there are none, some are missing, or the index names files elsewhere.
    """
    plain = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    for name in (named,) if named else plain:
        if (folder / name).is_file():
            return _listed(folder / name, None)
    single = [file for file in sorted(folder.glob("model.*.safetensors")) if not _SHARD.search(file.name)]
    variants = {file.name.removeprefix("model.").removesuffix(".safetensors"): file for file in single}
    for file in sorted(folder.glob("model.safetensors.index.*.json")):
        variants[file.name.removeprefix("model.safetensors.index.").removesuffix(".json")] = file
    if len(variants) > 1:
        raise ModelError(
            f"model.name: {folder} holds weights in the variants {', '.join(sorted(variants))} and none without a "
            "variant; rename the file to use to model.safetensors"
        )
    for variant, file in variants.items():
        return _listed(file, variant)
    raise ModelError(_no_weights(folder))


def _listed(file: Path, variant: str | None) -> WeightFiles:
    """A single file, or all that an index names."""
    if file.suffix != ".json":
        return WeightFiles((file,), variant)
    index = read_json(file)
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{file}: weight_map does not say which file holds which weight; download the file again")
    if not isinstance(index.get("metadata"), dict):
        raise ModelError(f'{file}: has no "metadata", which transformers reads; download it again, or add {{}}')
    shards = sorted(set(names.values()))
    for name in shards:
        inside = Path(name)
        if inside.is_absolute() or ".." in inside.parts or "\\" in name or ":" in name:
            raise ModelError(f"{file}: weight_map names {name!r}, which is not inside the model's folder")
    missing = [name for name in shards if not (file.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{file}: {len(missing)} of the {len(shards)} files that it names are missing: {some(missing)}; "
            "download them, too"
        )
    if len({Path(name).suffix for name in shards}) > 1:
        raise ModelError(f"{file}: weight_map names files of several formats ({some(shards)}); give those of one")
    return WeightFiles(tuple(file.parent / name for name in shards), variant, file)


_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")

_FOREIGN = {
    "*.gguf": "a GGUF file is read where model.name is the file itself",
    "*.safetensors": "the index model.safetensors.index.json, or the name model.safetensors, is missing",
    "pytorch_model-*.bin": "the index pytorch_model.bin.index.json is missing",
    "*.pth": "Meta's own format is not read: convert it with transformers",
    "*.pt": "torch files of other names are not read",
    "*.ckpt": "torch files of other names are not read",
    "*.h5": "TensorFlow's format is not read",
    "*.msgpack": "Flax's format is not read",
    "*.onnx": "ONNX files are not read",
    "*.npz": "NumPy's format is not read",
}


def _no_weights(folder: Path) -> str:
    ways = (
        "give a folder with model.safetensors, as save_pretrained writes it, or set model.random_weights: true to "
        "measure memory and speed only"
    )
    for pattern, reason in _FOREIGN.items():
        files = [file.name for file in sorted(folder.glob(pattern))]
        if files:
            return f"model.name: {folder} holds {some(files)}, but {reason}; {ways}"
    return f"model.name: {folder} holds no weights (no model.safetensors); {ways}"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        text = substitute_in(file) if file.is_file() else None
        raise ModelError(f"{file}: {f'is {text}' if text else f'no valid JSON: {first_line(error)}'}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: must hold a JSON object, not {type(content).__name__}")
    return content


def entries(files: WeightFiles) -> list[Entry]:
    """Every weight of safetensors files, from their headers.

    Raises:
        ModelError: a file is cut, a pointer, or not of this format.
    """
    return [entry for file in files.files for entry in safetensors_header.entries(file)]


def on_meta(files: WeightFiles) -> dict[str, Tensor]:
    """Every weight by name, with its shape and dtype and without its numbers.

    Raises:
        ModelError: a file cannot be read.
    """
    import torch
    from transformers.modeling_utils import str_to_torch_dtype

    if files.pickled:
        state: dict[str, Tensor] = {}
        for file in files.files:
            state |= {name: value for name, value in _unpickled(file, "meta").items() if hasattr(value, "shape")}
        return state
    return {
        entry.name: torch.empty(entry.shape, dtype=str_to_torch_dtype.get(entry.dtype, torch.uint8), device="meta")
        for entry in entries(files)
    }


def _unpickled(file: Path, device: str) -> dict[str, Any]:
    """A torch archive, read without running code from it; numbers stay in the file until they are used."""
    import torch

    try:
        try:
            loaded = torch.load(file, map_location=device, weights_only=True, mmap=device == "cpu")
        except RuntimeError:  # torch's format before 1.6 cannot be mapped
            loaded = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # unpickling raises whatever the file makes it raise
        code = "it holds more than weights, and reading the rest could run code"
        why = code if isinstance(error, pickle.UnpicklingError) else first_line(error)
        text = substitute_in(file)
        reason = f"cannot be read ({why}); save the model again with save_pretrained, which writes model.safetensors"
        raise ModelError(f"{file}: {f'is {text}' if text else reason}") from None
    if not isinstance(loaded, dict):
        raise ModelError(f"{file}: holds a {type(loaded).__name__}, not weights by name; save the model's state_dict")
    return loaded


def first_not_finite(files: WeightFiles) -> str | None:
    """The first weight with a NaN or an infinity, from the files; None if all are finite. Reads all of them."""
    from safetensors import safe_open

    for file in files.files:
        if files.pickled:
            loaded = _unpickled(file, "cpu")
            name = _first_not_finite_of(list(loaded), loaded.__getitem__)
        else:
            with safe_open(file, framework="pt") as opened:
                name = _first_not_finite_of(list(opened.keys()), opened.get_tensor)
        if name is not None:
            return name
    return None


def _first_not_finite_of(names: list[str], value: Callable[[str], Tensor]) -> str | None:
    import torch

    for name in names:
        tensor = value(name)
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            wide = tensor.float() if tensor.element_size() == 1 else tensor
            if not bool(torch.isfinite(wide).all()):
                return name
    return None


def digest(files: WeightFiles) -> str:
    """SHA-256 over names, dtypes, shapes and content of all weights, however they are spread over files.

    Content is read whole up to `WHOLE` bytes, else in three samples of each weight, so that a change of training shows.
    """
    total = hashlib.sha256()
    read_whole = files.num_bytes <= WHOLE
    if files.pickled:
        for file in files.files:
            total.update(file.name.encode())
            with file.open("rb") as handle:
                for begin, end in [(0, file.stat().st_size)] if read_whole else _samples(0, file.stat().st_size):
                    handle.seek(begin)
                    total.update(handle.read(end - begin))
        return total.hexdigest()
    by_file = {file: _mapped(file) for file in files.files}
    for entry in sorted(entries(files), key=lambda entry: entry.name):
        total.update(f"{entry.name}:{entry.dtype}:{entry.shape}:".encode())
        content = by_file[entry.file]
        for begin, end in [(entry.begin, entry.end)] if read_whole else _samples(entry.begin, entry.end):
            total.update(content[begin:end])
    return total.hexdigest()


def _mapped(file: Path) -> mmap.mmap:
    with file.open("rb") as handle:
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


def _samples(begin: int, end: int) -> list[tuple[int, int]]:
    """Start, middle and end."""
    places = (begin, (begin + end) // 2, end - SAMPLE)
    return [(max(begin, place), min(end, max(begin, place) + SAMPLE)) for place in places]
