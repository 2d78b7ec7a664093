"""A GGUF file in place of a model's folder: dequantised once, into a folder of the cache that everything else reads."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.errors import ModelError, first_line
from ray_peft.foundation.cache import entry, made_whole
from ray_peft.tasks.files import file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LAST = "config.json"
"""A file that every whole folder holds."""


def opened(name: str) -> str:
    """What to load for a model's name: of a GGUF file the folder with its weights in bfloat16, else the name itself.

    Raises:
        ModelError: the file cannot be converted.
    """
    if not name.endswith(".gguf"):
        return name
    file = Path(name).expanduser()
    if not file.is_file():
        raise ModelError(f"model.name: {file}: no such file")
    folder = entry("gguf", file_digest(file)[:24])
    if not (folder / LAST).is_file():
        with made_whole(folder, LAST) as partial:
            convert(file, partial)
    return str(folder)


def convert(file: Path, folder: Path) -> None:
    """Dequantise a GGUF file into `folder`: weights in bfloat16, config, tokenizer and chat template.

    Raises:
        ModelError: transformers cannot read it.
    """
    try:
        model, tokenizer = dequantised(file)
    except Exception as error:  # of the reader of the format, or of the architecture that it names
        raise ModelError(
            f"model.name: {file} is a GGUF file that transformers cannot read: {first_line(error)}; give the folder of "
            "the model that it was made from"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def dequantised(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a GGUF file in bfloat16, and its tokenizer."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers 5.23 shows its dequantising bar whatever its own setting

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, local_files_only=True, dtype=torch.float32
    )
    return serializable(loaded, tokenizer), tokenizer


def serializable(quantized: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A bf16 model with the weights of `quantized` (dequantised on load, float32) and the tokenizer's special tokens.

    transformers 5.23 refuses to save a model loaded from GGUF, so its weights move into a fresh one.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(quantized.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict(), strict=True)
    model.tie_weights()
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, token, getattr(tokenizer, token))
    model.bfloat16()
    model.config.dtype = torch.bfloat16
    return model
