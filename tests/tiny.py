"""A model of two layers and a byte-level tokenizer, built in a second; real classes, random weights."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build_tokenizer(folder: Path) -> None:
    """Bytes as tokens, and the two ChatML markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)


def build_model(folder: Path, *, seed: int = 0, talkative: bool = False) -> Path:
    """A Llama of about 120,000 weights, with its tokenizer, in `folder`.

    Small random weights repeat the last token; `talkative` ones are large, so that answers depend on the prompt.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    build_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=272, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=not talkative,
        initializer_range=0.5 if talkative else 0.02,
        bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


QUESTIONS = [
    {"prompt": f"What comes after {word}?", "completion": f"After {word} comes {after}."}
    for word, after in zip(
        ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"] * 6,
        ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"] * 6,
        strict=True,
    )
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def plain_spec(
    model: Path | str, data: Path | str, method: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """A trial of a few seconds, in plain form; `changes` are dotted with `__`, such as train__steps=4."""
    spec: dict[str, Any] = {
        "task": "llm_sft",
        "model": {"name": str(model), "dtype": "float32"},
        "data": {
            "sources": [{"recipe": "prompt_completion", "path": str(data), "train": 40, "test": 8}],
            "max_length": 96,
            # Six copies of ten questions, so that a few steps show in the scores: the test rows are trained on.
            "contamination": {"action": "allow"},
        },
        "method": method or {"name": "lora", "rank": 4, "lr": 0.01},
        "train": {"steps": 4, "batch_size": 8, "micro_batch_size": 4, "precision": "fp32", "log_every": 1},
        "evaluation": {"rows": 4, "max_new_tokens": 8, "batch_size": 4, "samples": 2},
        "resources": {"gpus_per_worker": 0, "cpus_per_worker": 2},
        "seed": 1,
    }
    for key, value in changes.items():
        target = spec
        *parents, last = key.split("__")
        for parent in parents:
            target = target[parent]
        target[last] = value
    return spec


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Passes this small are faster without waiting for each other, above all on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
