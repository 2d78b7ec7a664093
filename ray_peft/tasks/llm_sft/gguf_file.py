"""A merged model as one GGUF file, which llama.cpp and what is built on it run; transformers reads it back.

Names of tensors are those of the `gguf` package; their layout is that of llama.cpp's `convert_hf_to_gguf.py`, commit
a38b884: rows of query and key weights of Llama are reordered, and norms of Gemma, which count from zero, get one added.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.errors import SpecError, TrialFailed
from ray_peft.tasks.llm_sft.gguf_vocabulary import add_vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from numpy import ndarray
    from torch import Tensor

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "gemma2": "gemma2", "gemma3_text": "gemma3"}
"""GGUF's names of model types, as far as both its writer and transformers' reader know them."""

CHECKED_TOKENS = 64
"""Tokens whose logits are compared."""
TOLERANCE = 1e-4
"""Largest difference of two logits of at most 1, and share of larger ones. Adding one to a norm in float32 and taking
it away again costs 1e-7; a wrong layout gives other logits altogether."""


def write_gguf(folder: Path, file: Path) -> None:
    """Write a model's folder as a GGUF file in the dtype of its weights, and load it back to compare the logits.

    Args:
        folder: as transformers saves it.
        file: does not exist yet.

    Raises:
        SpecError: GGUF has no place for such a model or tokenizer.
        TrialFailed: the file gives other logits.
    """
    from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    check_config(config)
    kind = str(config["model_type"])
    names = get_tensor_name_map(
        next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[kind]),
        config["num_hidden_layers"],
    )
    writer = GGUFWriter(file, ARCHITECTURES[kind])
    try:
        _add_settings(writer, config, kind)
        add_vocabulary(writer, folder, config["vocab_size"])
        for name, tensor in _weights(folder).items():
            stem, _, ending = name.rpartition(".")
            gguf_name = names.get_name(stem)
            if gguf_name is None:
                raise SpecError(f"GGUF's {ARCHITECTURES[kind]} has no place for its weight {name}")
            if name == "lm_head.weight" and config.get("tie_word_embeddings", False):
                continue
            _add_tensor(writer, f"{gguf_name}.{ending}", _laid_out(tensor, name, config, kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    _check_logits(folder, file)


def check_config(config: dict[str, Any]) -> None:
    """Refuse a model that GGUF, or transformers' reader of it, has no place for.

    Raises:
        SpecError: it is of another type, or its positions are scaled.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise SpecError(f"models of type {kind} are not written to GGUF here, but {', '.join(ARCHITECTURES)} are")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = {str(part.get("rope_type", "default")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    if scaled := sorted(kinds - {"default"}):
        raise SpecError(f"its positions are scaled ({', '.join(scaled)}), which is not written to GGUF here")


def _add_settings(writer: GGUFWriter, config: dict[str, Any], kind: str) -> None:
    """The shape of the model, under GGUF's names."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_name(kind)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_freq_base(_rope_theta(config))
    if kind == "llama":
        writer.add_rope_dimension_count(head_dim)
    if kind.startswith("gemma"):
        writer.add_sliding_window(config["sliding_window"])
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _rope_theta(config: dict[str, Any]) -> float:
    """The base of rotary positions: of Gemma 3, that of its layers with full attention."""
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)


def _weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= load_file(path)
    return weights


def _laid_out(tensor: Tensor, name: str, config: dict[str, Any], kind: str) -> Tensor:
    """A weight as llama.cpp lays it out."""
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return tensor.float() + 1
    heads = config["num_attention_heads"]
    if kind == "llama" and ".q_proj." in name:
        return _pairs_of_neighbours(tensor, heads)
    if kind == "llama" and ".k_proj." in name:
        return _pairs_of_neighbours(tensor, config.get("num_key_value_heads") or heads)
    return tensor


def _pairs_of_neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head reordered: rotary positions turn rows i and i + half in transformers, 2 i and 2 i + 1 here."""
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape).contiguous()


def _add_tensor(writer: GGUFWriter, name: str, tensor: Tensor) -> None:
    """In its own dtype; vectors, of norms and biases, in float32."""
    import torch
    from gguf import GGMLQuantizationType

    if tensor.dim() == 1 or tensor.dtype == torch.float32:
        writer.add_tensor(name, tensor.float().numpy())
    elif tensor.dtype == torch.float16:
        writer.add_tensor(name, tensor.numpy())
    else:
        bits: ndarray[Any, Any] = tensor.to(torch.bfloat16).view(torch.uint8).numpy()
        writer.add_tensor(name, bits, raw_dtype=GGMLQuantizationType.BF16)


def _check_logits(folder: Path, file: Path) -> None:
    """Compare the file with the model that it was made of.

    Raises:
        TrialFailed: their logits differ.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        auto: Any = AutoModelForCausalLM
        model = auto.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (1, CHECKED_TOKENS), generator=torch.Generator().manual_seed(0))
        expected = model(ids).logits
        del model
        loaded = auto.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True, dtype=torch.float32)
        logits = loaded.eval()(ids).logits
    difference = float((logits - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise TrialFailed(
            f"{file.name} gives other logits than the model that it was made of, up to {difference:.3g} apart, so it "
            "is not kept: GGUF's settings cannot say all of this model's"
        )
