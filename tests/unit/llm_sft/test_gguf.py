"""A merged model as a GGUF file: the same logits and the same tokens when transformers reads it back."""

import json

import pytest
import tiny

from ray_peft.errors import SpecError, TrialFailed
from ray_peft.tasks.llm_sft import gguf_file
from ray_peft.tasks.llm_sft.gguf_file import write_gguf
from ray_peft.tasks.llm_sft.gguf_vocabulary import _split_name

SIZES = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3,
    "bos_token_id": 259, "eos_token_id": 260, "pad_token_id": 261,
}  # fmt: skip


ROPE = {"rope_theta": 5e4, "rope_type": "default"}


def build_tokenizer(folder):
    """Bytes with three merges, and the markers of ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [("o", "n"), ("on", "e"), ("t", "h")]
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE(vocab={symbol: place for place, symbol in enumerate(symbols)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = tiny.CHATML
    tokenizer.save_pretrained(folder)


def build(folder, kind, dtype="float32", **changes):
    """A random model of a type, with norms and biases that are not those of its start."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    build_tokenizer(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "dtype", "changes"),
    [
        ("llama", "float32", {}),
        ("llama", "bfloat16", {"tie_word_embeddings": True, "rope_parameters": ROPE}),
        ("qwen2", "float16", {}),
        ("gemma2", "bfloat16", {"head_dim": 32, "sliding_window": 16}),
        ("gemma3_text", "float32", {"head_dim": 32, "sliding_window": 16}),
    ],
)  # fmt: skip
def test_a_file_gives_the_logits_and_the_tokens_of_the_model_it_was_made_of(tmp_path, kind, dtype, changes):
    from transformers import AutoTokenizer

    folder = build(tmp_path / "merged", kind, dtype, **changes)
    file = tmp_path / "model.gguf"
    write_gguf(folder, file)  # raises if the logits differ
    assert file.stat().st_size > 50_000
    texts = ["What comes after one? 12 \u00fc \u8bd5", "<|im_start|>user\nSay it.<|im_end|>\n"]
    source, read = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert read(texts)["input_ids"] == source(texts)["input_ids"]
    assert read.chat_template == source.chat_template
    assert (read.bos_token_id, read.eos_token_id, read.pad_token_id) == (259, 260, 261)


def test_another_layout_of_a_weight_is_seen_in_the_logits(tmp_path, monkeypatch):
    folder = build(tmp_path / "merged", "llama")
    monkeypatch.setattr(gguf_file, "_pairs_of_neighbours", lambda tensor, heads: tensor)
    with pytest.raises(TrialFailed, match="model.gguf gives other logits than the model that it was made of"):
        write_gguf(folder, tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "models of type gpt2 are not written to GGUF here, but llama, qwen2, gemma2"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "its positions are scaled \\(llama3\\), which is not written",
        ),
    ],
)
def test_what_gguf_cannot_say_is_refused(changes, words):
    with pytest.raises(SpecError, match=words):
        gguf_file.check_config({"model_type": "llama", **changes})


@pytest.mark.parametrize(
    ("splitter", "name"),
    [
        ({"type": "ByteLevel", "use_regex": True}, "gpt-2"),
        (
            {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}],
            },
            "smollm",
        ),
        ({"type": "Whitespace"}, None),
    ],
)
def test_the_way_of_splitting_text_has_llama_cpps_name_or_is_refused(splitter, name):
    plain = json.loads(json.dumps({"pre_tokenizer": splitter}))
    if name is None:
        with pytest.raises(SpecError, match="its tokenizer splits text by Whitespace"):
            _split_name(plain)
    else:
        assert _split_name(plain) == name
