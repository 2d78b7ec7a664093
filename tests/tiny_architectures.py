"""Models of two layers of other architectures than the tiny Llama, with its tokenizer; real classes, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512,
}  # fmt: skip
_GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}
_EXPERTS = {**_LLAMA_LIKE, "num_key_value_heads": 2, "num_experts_per_tok": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "deepseek_v3": {
        **_EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "moe_intermediate_size": 32, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1,
    },
    "falcon": {**_LLAMA_LIKE, "new_decoder_architecture": False},
    "gpt2": _GPT,
    "gpt_neox": _LLAMA_LIKE,
    "llama": {**_LLAMA_LIKE, "num_key_value_heads": 2},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2},
    "mixtral": {**_EXPERTS, "num_local_experts": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
    "olmoe": {**_EXPERTS, "num_experts": 4, "intermediate_size": 32},
    "opt": {**_LLAMA_LIKE, "ffn_dim": 128, "word_embed_proj_dim": 32},
    "phi": _LLAMA_LIKE,
    "phi3": {**_LLAMA_LIKE, "num_key_value_heads": 2},
    "qwen2_moe": {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 32},
}  # fmt: skip
"""Settings by the name that transformers gives an architecture."""


def config(name: str, **changes: Any) -> Any:
    """A config of a few thousand weights."""
    from transformers import AutoConfig

    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    return AutoConfig.for_model(name, **{"vocab_size": 272, **ids, **ARCHITECTURES[name], **changes})


def on_meta(name: str, **changes: Any) -> Any:
    """The model without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(name, **changes))


def build(name: str, folder: Path, **changes: Any) -> Path:
    """The model with random weights and its tokenizer, in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    tiny.build_tokenizer(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config(name, **changes)).float().save_pretrained(folder)
    return folder
