"""Answers are greedy and as long as the trial says, whatever generation config the model brings along."""

import json

import pytest
import tiny
from transformers import AutoTokenizer
from untracked import run

from ray_peft.spec import ModelSpec, TrialSpec
from ray_peft.tasks.llm_sft.decoding import unused_settings
from ray_peft.tasks.llm_sft.task import LlmSft

# Each of them alone changes the answers, or ends `generate` with an error.
SETTINGS = {
    "stop_strings": ["a"],
    "return_dict_in_generate": True,
    "output_scores": True,
    "num_return_sequences": 2,
    "num_beams": 3,
    "prompt_lookup_num_tokens": 3,
    "suppress_tokens": list(range(32, 100)),
    "begin_suppress_tokens": list(range(100)),
    "forced_eos_token_id": 257,
    "forced_bos_token_id": 70,
    "bad_words_ids": [[token] for token in range(40, 90)],
    "sequence_bias": [[[65], 30.0]],
    "encoder_repetition_penalty": 3.0,
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "guidance_scale": 3.0,
    "watermarking_config": {"bias": 9.0},
    "max_time": 1e-9,
    "min_new_tokens": 8,
    "min_length": 100,
    "exponential_decay_length_penalty": [1, 5.0],
    "renormalize_logits": True,
    "do_sample": True,
    "temperature": 5.0,
    "top_k": 3,
    "max_length": 2,
    "max_new_tokens": 1,
    "cache_implementation": "static",
    "use_cache": False,
}


@pytest.fixture(scope="module")
def plain_folder(shared):
    return tiny.build_model(shared / "talkative-plain", talkative=True)


def brings(folder, settings):
    """The model of `folder` with a generation config of its own."""
    ids = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    (folder / "generation_config.json").write_text(json.dumps(ids | settings), encoding="utf-8")
    return folder


def answers(folder, questions, method=None):
    spec = TrialSpec.from_plain(tiny.plain_spec(folder, questions, method or {"name": "none"}))
    bench = LlmSft().load(spec, "cpu")
    if method is not None:
        bench.attach(spec.method)
    return bench.answer(bench.data.test)


@pytest.mark.parametrize("method", [None, {"name": "lora", "rank": 2}], ids=["base", "adapted"])
def test_no_setting_of_the_model_changes_an_answer(plain_folder, questions, method):
    wanted = answers(brings(plain_folder, {}), questions, method)
    assert len(set(wanted)) > 1
    for name, value in SETTINGS.items():
        assert answers(brings(plain_folder, {name: value}), questions, method) == wanted, name


def test_further_ids_that_end_an_answer_are_used(plain_folder, questions):
    wanted = answers(brings(plain_folder, {}), questions)
    first = ord(wanted[0][1])  # in a byte-level vocabulary of printable characters
    tokens = json.loads((plain_folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    ended = answers(brings(plain_folder, {"eos_token_id": [257, tokens[chr(first)]]}), questions)
    assert ended[0] == wanted[0][:2]


def test_what_is_not_used_is_named(plain_folder):
    brings(plain_folder, {"suppress_tokens": [65], "temperature": 0.6, "do_sample": True, "repetition_penalty": 1.1})
    assert unused_settings(ModelSpec(name=str(plain_folder))) == ["repetition_penalty", "suppress_tokens"]
    brings(plain_folder, {"temperature": 0.6, "do_sample": True, "top_p": 0.9})
    assert unused_settings(ModelSpec(name=str(plain_folder))) == []
    (plain_folder / "generation_config.json").write_text("{", encoding="utf-8")
    assert unused_settings(ModelSpec(name=str(plain_folder))) == []


def test_a_model_that_sets_nothing_of_its_own_is_not_cautioned_about(plain_folder):
    """Transformers 5 writes use_cache and output_* into every model; earlier ones wrote out all their defaults."""
    written = {"use_cache": True, "output_attentions": False, "output_hidden_states": False, "_from_model_config": True}
    brings(plain_folder, written | {"repetition_penalty": 1.0, "num_beams": 1, "length_penalty": 1.0, "min_length": 0})
    assert unused_settings(ModelSpec(name=str(plain_folder))) == []
    brings(plain_folder, written | {"num_beams": 4, "return_dict_in_generate": True})
    assert unused_settings(ModelSpec(name=str(plain_folder))) == ["num_beams", "return_dict_in_generate"]


def test_trained_weights_keep_the_model_s_own_settings(plain_folder, questions, tmp_path):
    brings(plain_folder, {"repetition_penalty": 1.3, "temperature": 0.0, "do_sample": True})
    row, tracker = run(TrialSpec.from_plain(tiny.plain_spec(plain_folder, questions, {"name": "full"})), tmp_path / "t")
    assert row.status == "finished", row.error


ENDS = {
    "a special token that is no end of sequence": "<|stop|>",
    "plain text": "##",
    "text that begins with a line break": "\n\nHuman:",
}


@pytest.mark.parametrize("mark", ENDS.values(), ids=ENDS)
def test_an_answer_ends_where_answers_end_in_the_training_rows(mark, shared, tmp_path):
    """A base model's tokenizer under a template with another end mark: the model learns it, and is stopped by it."""
    folder = tiny.build_model(shared / f"base-{abs(hash(mark))}", talkative=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if mark.startswith("<"):
        tokenizer.add_special_tokens({"additional_special_tokens": [mark]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ '" + mark.replace("\n", "\\n") + "' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    rows = tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i}?", "completion": "yes"} for i in range(60)])
    method = {"name": "full", "lr": 0.01, "weights": "float32"}
    plain = tiny.plain_spec(folder, rows, method, train__steps=40, evaluation__max_new_tokens=40)
    spec = TrialSpec.from_plain(plain)
    bench = LlmSft().load(spec, "cpu")
    ((stage, steps),) = spec.method.stages(40)
    bench.attach(stage)
    bench.train(stage, steps, 0, tmp_path / "train", lambda metrics, step: None)
    assert set(bench.answer(bench.data.test)) == {"yes"}
