"""The content of all files that decide the checks of a text trial before it starts."""

from __future__ import annotations

import json
from pathlib import Path

from ray_peft.spec import LlmTrialSpec, ModelSpec
from ray_peft.tasks import model_content as folders
from ray_peft.tasks.files import content_of
from ray_peft.tasks.llm_sft.gguf_model import opened

_CHAT_TEMPLATES = "additional_chat_templates"
"""The one folder below a model's from which transformers reads (5.23, tokenization_utils_base.py)."""


def model_content(model: ModelSpec) -> str | None:
    """Digest of a model's folder and that of its tokenizer; None if either is not here, or brings code of its own."""
    if model.trust_remote_code:
        return None
    contents = []
    base = opened(model.name)
    named = {opened(model.tokenizer or base): "tokenizer_config.json"} | {base: "config.json"}
    for name, file in named.items():
        folder = folders.folder_of(name, model.revision if name == base else None, file)
        if folder is None:
            return None
        contents.append(folders.content(folder, [_CHAT_TEMPLATES]))
    return " ".join(contents)


def content(spec: LlmTrialSpec) -> str | None:
    """Digest for a trial; None if something else decides, too.

    A data set of the hub is its id, as in the key of its prepared rows, which are not looked up again either.
    """
    if spec.evaluation.benchmarks is not None:
        return None
    contents: list[str | None] = [model_content(trial.model) for trial in (spec, *spec.members())]
    if None in contents:
        return None
    paths = [path for source in spec.data.sources for path in (source.path, source.test_path)]
    contents += [_file(path) for path in (*paths, spec.data.chat_template)]
    return json.dumps(contents)


def _file(path: str | None) -> str | None:
    return content_of(Path(path)) if path is not None and Path(path).exists() else path
