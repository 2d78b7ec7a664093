"""The keys of the prepared rows of text trials, from the content of their files; and the keys of release 0.1.0."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ray_peft.foundation.cache import entry
from ray_peft.spec import DataSpec, LlmTrialSpec, ModelSpec, is_local
from ray_peft.spec.identity import Content, differing
from ray_peft.tasks.files import content_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def data_key(version: int, data: DataSpec, tokenizer: PreTrainedTokenizerBase, answers_only: bool) -> str:
    """The content hash of prepared rows.

    Args:
        version: of the preparation.
        data: its settings count where they differ from their defaults, its files by what is in them.
        tokenizer: with the chat template and the special tokens that rows are written with.
        answers_only: only the answers' tokens carry loss.
    """
    files = [[_content(path) for path in (source.path, source.test_path)] for source in data.sources]
    template = [str(tokenizer.chat_template), _special_tokens(tokenizer)]
    decides = [version, answers_only, differing(data), files, template, _vocabulary(tokenizer)]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:24]


def prepared_folder(data: DataSpec, key: str) -> Path:
    """The folder with the prepared rows of this content."""
    # The same rows, but those with bad rows among them are refused where `unusable` says to fail.
    return entry("prepared", key if data.unusable == "fail" else f"{key}-skip")


def _content(path: str | None) -> str | None:
    """What is in a local file or folder; a hub id is its own name."""
    return content_of(Path(path)) if path is not None and Path(path).exists() else path


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())


def released(spec: LlmTrialSpec, row: LlmTrialSpec, tokenizer: PreTrainedTokenizerBase) -> Content:
    """The name that release 0.1.0 would give to a trial's content if its files were where those of an earlier row were.

    Args:
        spec: the trial, with the files of today.
        row: the spec of a row with the same settings, whose paths 0.1.0 made part of the key.
        tokenizer: of `spec`.
    """
    plain = {name: value for name, value in row.data.plain().items() if name in _RELEASED_DATA}
    plain["sources"] = [{name: source[name] for name in _RELEASED_SOURCE} for source in plain["sources"]]
    answers_only = spec.train.loss == "answers"
    digest = hashlib.sha256(json.dumps([7, answers_only, plain], sort_keys=True).encode())
    for source in spec.data.sources:
        for path in filter(None, (source.path, source.test_path)):
            if Path(path).is_file():
                with open(path, "rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
    digest.update(str(tokenizer.chat_template).encode())
    digest.update(_vocabulary(tokenizer).encode())
    return Content(_released_model(spec.model), digest.hexdigest()[:24])


_RELEASED_DATA = ("sources", "seed", "max_length", "too_long", "chat_template", "contamination")
_RELEASED_SOURCE = ("recipe", "path", "test_path", "train", "test", "validation", "name", "split")


def _released_model(model: ModelSpec) -> str:
    """A local model's config, and the names and sizes of its weights; of a hub model only what the settings name."""
    if not is_local(model.name):
        return model.revision or "unknown"
    digest = hashlib.sha256((Path(model.name) / "config.json").read_bytes())
    for file in sorted(Path(model.name).glob("*.safetensors")):
        digest.update(f"{file.name}:{file.stat().st_size}".encode())
    return digest.hexdigest()[:16]
