"""The weight files of a pipeline's parts: which ones are read, and whether they fit the configurations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.errors import ModelError, first_line
from ray_peft.foundation.lists import some
from ray_peft.tasks.one_model import ADAPTER_CONFIG
from ray_peft.tasks.safetensors_header import entries

if TYPE_CHECKING:
    from torch import nn

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""The names of each part's weight files, before the variant and .safetensors."""

_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in the attention of a VAE in files of diffusers before 0.18, which can be read, too."""


def variant_of(folder: Path, part: str) -> str | None:
    """The variant of a part's weights, such as fp16; None if there are plain ones, which are preferred.

    Raises:
        ModelError: there are no weights as safetensors, or several variants and no plain ones.
    """
    stem = STEMS[part]
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if f"{stem}.safetensors" in files or (folder / f"{stem}.safetensors.index.json").is_file():
        return None
    inner = {
        name.removeprefix(f"{stem}.").removesuffix(".safetensors") for name in files if name.startswith(f"{stem}.")
    }
    inner |= {
        file.name.removeprefix(f"{stem}.safetensors.index.").removesuffix(".json")
        for file in folder.glob(f"{stem}.safetensors.index.*.json")
    }
    variants = sorted({name.partition("-")[0] for name in inner})
    if len(variants) == 1:
        return variants[0]
    if variants:
        raise ModelError(
            f"model.name: {folder} holds weights in the variants {', '.join(variants)} and none without a variant; "
            f"rename the one to use to {stem}.safetensors"
        )
    raise ModelError(f"model.name: {folder} holds no *.safetensors weights{_other_files(folder, files, stem)}")


def _other_files(folder: Path, files: Sequence[str], stem: str) -> str:
    random = "set model.random_weights: true to measure memory and speed only"
    if files:
        return f" called {stem}.safetensors (found {some(files)}); rename the file, or {random}"
    pickles = sorted(file.name for ending in ("bin", "ckpt", "pt", "pth") for file in folder.glob(f"*.{ending}"))
    if pickles:
        return (
            f" but {pickles[0]}, whose kind may run code and is not read; load the pipeline with diffusers and write "
            f"it with save_pretrained(safe_serialization=True), or {random}"
        )
    return f"; give a folder with weights, or {random}"


def files_of(folder: Path, part: str) -> list[Path]:
    """The weight files that are read for a part.

    Raises:
        ModelError: there are none, or one that the index names is missing.
    """
    variant = variant_of(folder, part)
    stem = STEMS[part] + (f".{variant}" if variant else "")
    if (folder / f"{stem}.safetensors").is_file():
        return [folder / f"{stem}.safetensors"]
    index = folder / f"{STEMS[part]}.safetensors.index{f'.{variant}' if variant else ''}.json"
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"model.name: {index} is no index of weight files: {first_line(error)}") from None
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing or not shards:
        raise ModelError(
            f"model.name: {folder}: {len(missing)} of {len(shards)} files that {index.name} names are missing: "
            f"{some(missing)}; download them, too"
        )
    return [folder / shard for shard in shards]


def check_weights(folder: Path, part: str, model: nn.Module) -> None:
    """Compare the names and shapes of a part's weights, from the files' headers, with those of its configuration.

    Raises:
        ModelError: a file is not whole, a weight is missing, one is left over, or one has another shape.
    """
    stored: dict[str, tuple[int, ...]] = {}
    for file in files_of(folder, part):
        stored |= _shapes(file)
    stored = _with_current_names(stored, part)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = {_short(name, part): shape for name, shape in expected.items()}
    say = f"model.name: {folder}: config.json and weights do not belong together: "
    if missing := sorted(expected.keys() - stored.keys()):
        raise ModelError(f"{say}{some(missing)} of {len(expected)} are missing in the files; download both again")
    if more := sorted(stored.keys() - expected.keys()):
        raise ModelError(f"{say}the files hold {some(more)}, which the config has no layer for; download both again")
    for name, shape in expected.items():
        if stored[name] != shape:
            raise ModelError(f"{say}{name} is {stored[name]} in the files, and {shape} by the config")


def _with_current_names(shapes: Mapping[str, tuple[int, ...]], part: str) -> dict[str, tuple[int, ...]]:
    """Names as in today's classes, without buffers that older versions stored."""
    renamed = {}
    for name, shape in shapes.items():
        short = _short(name, part)
        if short.endswith("position_ids") or (part == "text_encoder" and _is_of_clip(short)):
            continue
        if part == "vae" and ".attentions." in short:
            *start, layer, kind = short.split(".")
            short = ".".join([*start, _OLD_NAMES.get(layer, layer), kind])
            shape = shape[:2] if kind == "weight" and len(shape) == 4 else shape
        renamed[short] = shape
    return renamed


def _short(name: str, part: str) -> str:
    return name.removeprefix("text_model.") if part == "text_encoder" else name


def _is_of_clip(name: str) -> bool:
    """True for the parts of a whole CLIP beside its text encoder: some files hold them, but they are not used."""
    return name.startswith(("vision_model.", "visual_projection.", "text_projection.", "logit_scale"))


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        return {entry.name: entry.shape for entry in entries(file)}
    except OSError as error:
        raise ModelError(f"model.name: {file}: cannot be read: {error.strerror or error}") from None
    except ModelError as error:
        raise ModelError(f"model.name: {error}") from None


def single_file_in(folder: Path) -> str | None:
    """A sentence on a checkpoint in one file, or an adapter, in place of a pipeline; None if there is none."""
    names: list[Any] = sorted(file.name for file in folder.iterdir() if file.is_file())
    if adapters := [name for name in names if name in (ADAPTER_CONFIG, "pytorch_lora_weights.safetensors")]:
        return f"it holds an adapter ({adapters[0]}): name the pipeline that it was trained on"
    if checkpoints := [name for name in names if name.lower().endswith((".safetensors", ".ckpt", ".gguf"))]:
        return f"{checkpoints[0]} is a checkpoint in one file: {FROM_SINGLE_FILE}"
    return None


FROM_SINGLE_FILE = (
    "convert it with diffusers' StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER), and name FOLDER"
)
