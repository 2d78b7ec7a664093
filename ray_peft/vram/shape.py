"""What decides a model's memory: its config.json, without names and paths."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NOT_SHAPE = ("_name_or_path", "_commit_hash", "transformers_version", "_diffusers_version", "architectures", "dtype")


@dataclass(frozen=True)
class ModelShape:
    """A model's architecture. Equal shapes take equal memory."""

    config: str
    """config.json with sorted keys."""

    @classmethod
    def from_config(cls, config: PretrainedConfig | dict[str, Any] | Path) -> ModelShape:
        """From a config of transformers or diffusers, its plain form, or the file.

        Raises:
            OSError, ValueError: the file cannot be read.
        """
        plain: dict[str, Any]
        if isinstance(config, Path):
            plain = json.loads(config.read_text(encoding="utf-8"))
        else:
            plain = config if isinstance(config, dict) else config.to_dict()
        settings = {key: value for key, value in plain.items() if key not in _NOT_SHAPE}
        return cls(json.dumps(settings, sort_keys=True, default=str))

    def plain(self) -> dict[str, Any]:
        """The config's settings."""
        settings: dict[str, Any] = json.loads(self.config)
        return settings
