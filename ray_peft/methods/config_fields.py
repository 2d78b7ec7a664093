"""Fields of PEFT's configs as a user writes them, checked against PEFT's own dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ray_peft.errors import SpecError
from ray_peft.methods.kinds import config_type

_OURS = {
    "target_modules": "method.targets",
    "target_parameters": "method.targets",
    "modules_to_save": "method.modules_to_save",
}
"""Fields that a method has itself."""
_NOT_OURS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
    "layer_replication", "megatron_config", "megatron_core", "arrow_config", "alora_invocation_tokens",
    "trainable_token_indices", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
"""Fields that PEFT fills in, or that need more than a config."""
_METHODS = {"ADALORA": "adalora", "LN_TUNING": "ln_tuning"}
"""Kinds that need more than a config, and have a method."""
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Of LoRA: initial values that need neither the weights nor data."""


def check_fields(kind: str, fields: dict[str, Any], *, key: str) -> None:
    """Refuse fields that PEFT's config does not have, or that have another type.

    Args:
        kind: PEFT's name of the config.
        fields: as they are written.
        key: where they stand in the trial's settings.

    Raises:
        SpecError: with a line for each problem.
    """
    if kind in _METHODS:
        raise SpecError(
            f"{key}: an adapter of kind {kind.lower()} needs more than its config; use method {_METHODS[kind]}"
        )
    config = config_type(kind)
    types = typing.get_type_hints(config)
    names = [
        field.name for field in dataclasses.fields(config) if field.init and field.name not in _NOT_OURS | _OURS.keys()
    ]
    problems = []
    for name, value in fields.items():
        if name in _OURS:
            problems.append(f"{key}.{name}: is {_OURS[name]} here; write it there")
        elif name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            suggestion = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
            problems.append(f"{key}.{name}: PEFT's {config.__name__} has no such field that can be set; {suggestion}")
        elif not _fits(types[name], value):
            problems.append(f"{key}.{name}: must be {_words(types[name])} (found {value!r})")
    start = fields.get("init_lora_weights", True) if kind == "LORA" else True
    if not problems and start not in _PLAIN_STARTS:
        problems.append(
            f"{key}.init_lora_weights: {start} starts from the weights or from data; use method pissa or olora, or one "
            "of true, gaussian and orthogonal"
        )
    if problems:
        raise SpecError("\n".join(problems))


def _fits(kind: Any, value: Any) -> bool:
    try:
        TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        return False
    return True


def _words(kind: Any) -> str:
    """A type for people: `int`, `float or None`."""
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(str(value) for value in typing.get_args(kind))
    parts = typing.get_args(kind)
    if parts and typing.get_origin(kind) not in (list, dict, set, tuple):
        return " or ".join(dict.fromkeys(_words(part) for part in parts))
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))
