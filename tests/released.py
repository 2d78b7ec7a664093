"""What the stores in tests/assets were made of. Never change it: their rows are recognised by content.

Each store is the folder that `sweep` of that release wrote, of the trials below, without logs and MLflow. To add one
for a new release, run `write_inputs` and its sweep with that release, and keep results.jsonl, sweep.json and trials/.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

STORES = Path(__file__).parent / "assets"
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def write_inputs(folder: Path) -> Path:
    """A model, its tokenizer, rows and a search space of four trials in `folder`; returns the search space."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_model(folder / "model")
    rows = [
        {"prompt": f"{first} and {second}?", "completion": f"{second} and {first}."}
        for first in NUMBERS
        for second in NUMBERS[:4]
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    lora = {"name": "lora", "rank": 2, "lr": 0.01}
    members = [{"method": lora}, {"method": {**lora, "rank": 1}}]
    methods = [{"name": "none"}, lora, {"name": "ensemble", "members": members}]
    source = {
        "recipe": "prompt_completion",
        "path": str(folder / "rows.jsonl"),
        "train": 24,
        "test": 8,
        "validation": 4,
    }
    space = {
        "name": "released",
        "model": {"name": str(folder / "model"), "dtype": "float32"},
        "data": {"sources": [source], "max_length": 64, "contamination": {"action": "allow"}},
        "method": {"grid": methods},
        "train": {"steps": 2, "batch_size": 4, "micro_batch_size": 4, "precision": "fp32", "log_every": 1},
        "evaluation": {"rows": 2, "max_new_tokens": 4, "batch_size": 4, "samples": 1},
        "resources": {"gpus_per_worker": 0, "cpus_per_worker": 1},
        "seed": 3,
    }
    path = folder / "released.yaml"
    path.write_text(yaml.safe_dump(space, sort_keys=False), encoding="utf-8")
    return path


def _write_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, eos_token_id=256, pad_token_id=257,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    # The config names the library's version, and it is part of what release 0.1.0 called the model's fingerprint.
    config_file = folder / "config.json"
    text = re.sub(r'"transformers_version": "[^"]*"', '"transformers_version": "5.23.0"', config_file.read_text())
    config_file.write_text(text, encoding="utf-8")
