"""Tokenizers that pad with the end token or not at all, templates without system turns, models of another kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_architectures

from ray_peft.errors import ModelError
from ray_peft.foundation.units import GIB
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.task import LlmSft
from ray_peft.vram import ModelShape

LORA = {"name": "lora", "rank": 4, "lr": 0.01}
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def spec_of(model: Path, rows: Path, **changes: Any) -> LlmTrialSpec:
    return LlmTrialSpec.from_plain(tiny.plain_spec(model, rows, LORA, **changes))


def with_tokenizer(model: Path, folder: Path, **settings: Any) -> Path:
    """A copy of a model whose tokenizer has other settings; None takes one out."""
    shutil.copytree(model, folder)
    file = folder / "tokenizer_config.json"
    plain = json.loads(file.read_text(encoding="utf-8")) | settings
    file.write_text(json.dumps({key: value for key, value in plain.items() if value is not None}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("pad", ["<|im_end|>", None], ids=["pad is eos", "no pad token"])
def test_the_token_to_pad_with_changes_no_row_loss_or_answer(
    pad: str | None, tiny_model: Path, uneven: Path, tmp_path: Path
) -> None:
    """Above all, the token that ends an answer is trained although it pads."""
    outcomes = []
    for place, model in enumerate([tiny_model, with_tokenizer(tiny_model, tmp_path / "model", pad_token=pad)]):
        bench: Any = LlmSft().load(spec_of(model, uneven), "cpu")
        assert bench.tokenizer.pad_token == ("<|pad|>" if place == 0 else "<|im_end|>")
        rows = list(bench.data.train["labels"])
        assert all(257 in labels for labels in rows)
        log: list[dict[str, float]] = []
        ((stage, steps),) = bench.spec.method.stages(4)
        bench.attach(stage)
        bench.train(stage, steps, 0, tmp_path / str(place), lambda metrics, _, log=log: log.append(dict(metrics)))
        losses = [entry["loss"] for entry in log if "loss" in entry]
        outcomes.append((rows, losses, bench.eval_loss(), bench.answer(bench.data.test)))
    (rows, losses, loss, answers), others = outcomes
    assert others[0] == rows
    assert others[1] == pytest.approx(losses, rel=1e-5)
    assert others[2] == pytest.approx(loss, rel=1e-5)
    assert others[3] == answers


def test_system_text_stands_in_the_user_s_turn_where_the_template_refuses_system_turns(
    tiny_model: Path, tmp_path: Path
) -> None:
    turns = [[("system", f"Be {n}."), ("user", f"Who is {n}?"), ("assistant", f"I am {n}.")] for n in range(60)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in turns]
    (template := tmp_path / "no_system.jinja").write_text(NO_SYSTEM, encoding="utf-8")
    data = tiny.write_rows(tmp_path / "chats.jsonl", rows)
    sources = [{"recipe": "messages", "path": str(data), "train": 40, "test": 8}]
    spec = spec_of(tiny_model, data, data__chat_template=str(template), data__sources=sources)
    bench: Any = LlmSft().load(spec, "cpu")
    texts = [bench.tokenizer.decode(ids) for ids in bench.data.train["input_ids"]]
    assert len(texts) == 40
    assert all("<|im_start|>user\nBe " in text and ".\n\nWho is " in text and "system" not in text for text in texts)


def test_a_model_with_an_encoder_is_one_clear_error(tiny_model: Path, questions: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    size = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 272}
    AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **size)).save_pretrained(tmp_path / "t5")
    tiny.build_tokenizer(tmp_path / "t5")
    with pytest.raises(
        ModelError, match="has an encoder and a decoder; task llm_sft needs a causal language"
    ) as caught:
        LlmSft().inspect(spec_of(tmp_path / "t5", questions))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("architecture", ["olmoe", "qwen2_moe"])
def test_what_gets_adapters_in_a_mixture_is_said(architecture: str, questions: Path, tmp_path: Path) -> None:
    folder = tiny_architectures.build(architecture, tmp_path / architecture)
    notes = LlmSft().inspect(spec_of(folder, questions)).method_notes
    assert any("experts.gate_up_proj" in note and "experts.down_proj" in note for note in notes), notes


LLAMA: dict[str, Any] = {"vocab_size": 32000, "max_position_embeddings": 32768, "tie_word_embeddings": False}
SIZES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "tokens", "checkpointing", "most_gib"),
    [("7b", 512, False, 12), ("7b", 2048, True, 12), ("13b", 2048, True, 16), ("1b", 16384, True, 24)],
)
def test_large_models_fit_where_the_study_asks_for_them(
    size: str, tokens: int, checkpointing: bool, most_gib: int, shared: Path
) -> None:
    from transformers import LlamaConfig

    from ray_peft.tasks.llm_sft.memory import predict

    settings = {
        "model__dtype": "bfloat16", "train__precision": "bf16", "train__micro_batch_size": 1, "train__batch_size": 8,
        "train__gradient_checkpointing": checkpointing, "data__max_length": tokens, "evaluation__generate": False,
    }  # fmt: skip
    spec = LlmTrialSpec.from_plain(tiny.plain_spec("m/m", "d/d", {"name": "qlora", "rank": 16}, **settings))
    shape = ModelShape.from_config(LlamaConfig(**{**LLAMA, **SIZES[size]}))
    assert predict(spec, shape, longest_tokens=tokens).needed < most_gib * GIB
