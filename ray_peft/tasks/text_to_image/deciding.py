"""The content of all files that decide the checks of an image trial before it starts."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ray_peft.errors import DataError
from ray_peft.spec import ImageTrialSpec, ModelSpec, is_local
from ray_peft.tasks import model_content as folders
from ray_peft.tasks.files import content_of
from ray_peft.tasks.text_to_image.listing import files_of

_READ = ("unet", "vae", "text_encoder", "scheduler", "tokenizer")


def model_content(model: ModelSpec) -> str | None:
    """Digest of a pipeline's parts and of its tokenizer; None if one of them is not here."""
    folder = folders.folder_of(model.name, model.revision, "model_index.json")
    if folder is None:
        return None
    contents = [folders.content(folder, _READ)]
    if model.tokenizer is not None:
        tokenizer = folders.folder_of(model.tokenizer, None, "tokenizer_config.json")
        if tokenizer is None:
            return None
        contents.append(folders.content(tokenizer))
    return " ".join(contents)


def content(spec: ImageTrialSpec) -> str | None:
    """Digest of a trial's model and of all files in and below its folder of images; None for a data set of the hub."""
    model = model_content(spec.model)
    folder = Path(spec.data.path).expanduser()
    if model is None or not is_local(spec.data.path) or not folder.is_dir():
        return None
    try:
        listing = files_of(folder)
    except DataError:
        return None
    digest = hashlib.sha256(f"{model} {sorted(listing.lost)}".encode(errors="surrogateescape"))
    for name, path in listing.files.items():
        digest.update(f"{name}:{content_of(path)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
