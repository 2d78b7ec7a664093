"""Whether a folder that is named as a model is one; each thing that people name instead has its own way out."""

from __future__ import annotations

from pathlib import Path

from ray_peft.errors import ModelError
from ray_peft.foundation.lists import some
from ray_peft.tasks.llm_sft.weight_files import read_json

_LOOKED_INTO = 3
"""Levels of folders below the named one in which a model is looked for."""


def check_folder(folder: Path) -> None:
    """Refuse a path that is not a folder with a readable config.json of a model.

    Raises:
        ModelError: with the way out.
    """
    if folder.is_file():
        raise ModelError(_file_given(folder))
    if not folder.is_dir():
        raise ModelError(f"model.name: {folder}: no such folder")
    check_no_adapter(str(folder), None)
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(_no_config(folder))
    config = read_json(file)
    if "model_type" not in config and "auto_map" not in config:
        raise ModelError(f"{file}: names no model_type, so it is no config of a transformers model")
    _check_generation_config(folder)


def _file_given(file: Path) -> str:
    return f"model.name: {file} is a file; give the folder that holds it with its config.json: {file.parent}"


def _no_config(folder: Path) -> str:
    start = f"model.name: {folder} holds no config.json"
    if (folder / "model_index.json").is_file():
        return f"{start} but a diffusers pipeline (model_index.json), which is for task text_to_image"
    below = [file.parent for depth in range(1, _LOOKED_INTO + 1) for file in folder.glob("*/" * depth + "config.json")]
    if below:
        return f"{start}; give the folder that does: {some([str(path) for path in sorted(below)])}"
    if not any(folder.iterdir()):
        return (
            f"model.name: {folder} is empty; give a folder with config.json and weights, as save_pretrained writes it"
        )
    return f"{start}; give a folder with config.json and weights, as save_pretrained writes it"


def check_no_adapter(name: str, revision: str | None) -> None:
    """Refuse an adapter in place of a model: transformers would load the base that it names, with it on top.

    Raises:
        ModelError: there is an adapter_config.json.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        config_file = find_adapter_config_file(name, revision=revision)
    except Exception:  # noqa: BLE001 - a hub out of reach; who loads the config says so
        return
    if config_file is None:
        return
    base = read_json(Path(config_file)).get("base_model_name_or_path") or "its base model"
    raise ModelError(
        f"model.name: {name} is an adapter (adapter_config.json) and no whole model; give {base}, or merge the adapter "
        "into it first (PEFT's merge_and_unload, then save_pretrained) and give that folder"
    )


def _check_generation_config(folder: Path) -> None:
    """Refuse ids that are no tokens; all else of the file may be odd, since answers are decoded as the trial says.

    Raises:
        ModelError: an id is none.
    """
    file = folder / "generation_config.json"
    try:
        plain = read_json(file)
    except ModelError:  # missing or unreadable: transformers takes the ids of config.json
        return
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = plain.get(name)
        tokens = value if isinstance(value, list) else [value]
        if value is not None and not all(type(token) is int for token in tokens):
            raise ModelError(f"{file}: {name} must be the number of a token, or a list of them (found {value!r})")
