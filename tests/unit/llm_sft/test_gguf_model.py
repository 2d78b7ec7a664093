"""A GGUF file as `model.name`: dequantised once, and then a model like any other."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch

from ray_peft.errors import ModelError
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft import gguf_model
from ray_peft.tasks.llm_sft.model import fingerprint, load_config, load_model
from ray_peft.tasks.llm_sft.tokenizer import load_tokenizer

_PLACES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write(folder: Path, file: Path) -> Path:
    """A tiny Llama's folder as a GGUF file with 8-bit matrices, in llama.cpp's layout."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, folder, config.vocab_size)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        place = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(name)
        if place is None:
            layer, _, inner = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
            place = f"blk.{layer}.{_PLACES[inner]}.weight"
        numbers = tensor.float().numpy()
        count = heads.get(place.split(".")[2]) if place.startswith("blk") else None
        if count is not None:  # llama.cpp turns pairs of neighbours where transformers turns halves
            rows, columns = numbers.shape
            numbers = numbers.reshape(count, 2, rows // count // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        kind = gguf.GGMLQuantizationType.Q8_0 if numbers.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(np.ascontiguousarray(numbers), kind)
        writer.add_tensor(place, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    plain = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {number: token for token, number in plain["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in plain["added_tokens"]}
    words = [tokens.get(number) or special.get(number) or f"<unused{number}>" for number in range(size)]
    words[size - 1] = "\u0100" * 2  # the format needs a merge: of two zero bytes, which no text holds
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3 if number in special else 1 for number in range(size)])
    writer.add_token_merges(["\u0100 \u0100"])
    ids = {content: number for number, content in special.items()}
    writer.add_bos_token_id(ids["<|im_start|>"])
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_pad_token_id(ids["<|pad|>"])
    writer.add_chat_template(tiny.CHATML)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_PEFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    folder = tiny.build_model(tmp_path / "model", talkative=False)
    return folder, write(folder, tmp_path / "tiny-Q8_0.gguf")


def test_a_gguf_model_trains_like_the_model_that_it_was_made_from(files, monkeypatch):
    folder, file = files
    plain, dequantised = (
        TrialSpec.from_plain(tiny.plain_spec(path, "d/d", {"name": "lora", "rank": 4})) for path in (folder, file)
    )
    ids = torch.arange(24)[None]
    first, second = (load_model(spec, "cpu")(ids).logits for spec in (plain, dequantised))
    torch.testing.assert_close(second, first, rtol=0.05, atol=0.02)
    assert load_config(dequantised.model).num_hidden_layers == 2
    row = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "there"}]
    texts = [load_tokenizer(spec).apply_chat_template(row, tokenize=False) for spec in (plain, dequantised)]
    assert texts[0] == texts[1]
    assert load_tokenizer(dequantised)(texts[0])["input_ids"] == load_tokenizer(plain)(texts[0])["input_ids"]
    before = fingerprint(dequantised.model)
    monkeypatch.setattr(gguf_model, "convert", lambda *_: pytest.fail("it is converted once"))
    copy = file.with_name("elsewhere.gguf")
    copy.write_bytes(file.read_bytes())
    assert fingerprint(dequantised.model.model_copy(update={"name": str(copy)})) == before


def test_a_file_that_is_none_is_refused_with_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_PEFT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="no such file"):
        gguf_model.opened(str(tmp_path / "away.gguf"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"broken.gguf is a GGUF file that.*made from"):
        gguf_model.opened(str(tmp_path / "broken.gguf"))
