"""Labels cover the answers and their end-of-turn, prepared rows are kept by content."""

import pytest
import tiny
from datasets import load_from_disk

from ray_peft.errors import DataError, ModelError
from ray_peft.foundation.cache import cache_folder
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft import data
from ray_peft.tasks.llm_sft.conversation import Conversation, Unusable
from ray_peft.tasks.llm_sft.encode import encode
from ray_peft.tasks.llm_sft.tokenizer import load_tokenizer

TURNS = (
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes \u00fc."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "No."},
)


@pytest.fixture(scope="module")
def spec(tiny_model, questions):
    return TrialSpec.from_plain(tiny.plain_spec(tiny_model, questions))


@pytest.fixture(scope="module")
def tokenizer(spec):
    return load_tokenizer(spec)


def changed(spec, **changes):
    plain = spec.plain()
    plain["data"] |= changes
    return TrialSpec.from_plain(plain)


def test_labels_are_the_answers_with_their_end_of_turn(tokenizer):
    ids, labels = encode(Conversation(turns=TURNS), tokenizer)
    kept = [label for label in labels if label != data.IGNORED]
    assert tokenizer.decode(kept) == "Yes \u00fc.<|im_end|>No.<|im_end|>"
    assert all(label in (data.IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_labels_equal_trl_s_own_masks_where_its_template_has_them(tokenizer):
    marked = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    )
    theirs = tokenizer.apply_chat_template(
        list(TURNS), chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, labels = encode(Conversation(turns=TURNS), tokenizer)
    assert ids == theirs["input_ids"]
    assert [int(label != data.IGNORED) for label in labels] == theirs["assistant_masks"]


def test_plain_text_is_labelled_whole_and_ends(tokenizer):
    ids, labels = encode(Conversation(text="abc"), tokenizer)
    assert labels == ids
    assert ids[-1] == tokenizer.eos_token_id


def test_prepared_rows_are_made_once_and_hold_no_test_row(spec, tokenizer, monkeypatch):
    first = data.prepare(spec, tokenizer)
    assert (len(first.train), len(first.test)) == (40, 8)
    monkeypatch.setattr(data, "_build", lambda *_: pytest.fail("prepared twice"))
    assert data.prepare(spec, tokenizer).key == first.key
    row = first.test[0]
    assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert row["reference"] in tokenizer.decode(row["input_ids"])


def test_validation_rows_have_the_columns_of_test_rows_and_are_none_unless_asked_for(spec, tokenizer):
    assert data.prepare(spec, tokenizer).validation is None
    asked = changed(spec, sources=resized(spec, validation=6))
    prepared = data.prepare(asked, tokenizer)
    assert prepared.validation.column_names == prepared.test.column_names
    assert (len(prepared.train), len(prepared.validation), len(prepared.test)) == (40, 6, 8)
    assert prepared.counts[0].validation == 6
    note = data.notes(prepared, asked.data)[0]
    assert "6 validation rows" in note


def test_validation_rows_that_repeat_test_rows_are_left_out(spec, tokenizer, tmp_path):
    rows = [{"prompt": f"Which number comes next in line after {n} and {n * n}, my friend?", "completion": f"{n + 1}."}
            for n in range(40)]  # fmt: skip
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    tiny.write_rows(tmp_path / "test.jsonl", rows[:20])
    source = {"path": str(tmp_path / "rows.jsonl"), "test_path": str(tmp_path / "test.jsonl")}
    source |= {"train": 5, "validation": 20, "test": 20}
    plain = changed(spec, contamination={"action": "drop"}).plain()
    plain["data"]["sources"][0] |= source
    prepared = data.prepare(TrialSpec.from_plain(plain), tokenizer)
    (counts,) = prepared.counts
    assert counts.validation_dropped > 0
    assert counts.validation == 20 - counts.validation_dropped == len(prepared.validation)
    assert not set(prepared.validation["prompt"]) & set(prepared.test["prompt"])
    assert f"{counts.validation_dropped} validation rows left out" in data.notes(prepared, spec.data)[0]


def test_all_sources_are_mixed_by_the_seed(spec, tokenizer):
    parts = [resized(spec, name=name, train=20, test=4)[0] for name in ("first", "second")]
    orders = []
    for seed, cache in ((3, "a"), (3, "b"), (4, "c")):
        folder = cache_folder() / cache
        data._build(changed(spec, sources=parts, seed=seed).data, tokenizer, True, folder)
        orders.append(list(load_from_disk(folder / "train")["source_dataset"]))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == ["first"] * 20 + ["second"] * 20
    assert set(orders[0][:10]) == {"first", "second"}


def test_a_changed_limit_seed_template_or_file_is_another_key(spec, tokenizer, tmp_path):
    keys = {data.prepare(changed(spec, **change), tokenizer).key for change in ({}, {"max_length": 64}, {"seed": 7})}
    copy = tiny.write_rows(tmp_path / "copy.jsonl", tiny.QUESTIONS)
    source = spec.plain()["data"]["sources"][0] | {"path": str(copy)}
    assert data.prepare(changed(spec, sources=[source]), tokenizer).key in keys  # the same rows in another file
    tiny.write_rows(copy, [{**row, "completion": row["completion"] + "!"} for row in tiny.QUESTIONS])
    keys.add(data.prepare(changed(spec, sources=[source]), tokenizer).key)
    assert len(keys) == 4


@pytest.mark.parametrize(("too_long", "words"), [("cut", "rows longer than 66 tokens cut"), ("drop", "left out")])
def test_rows_over_the_limit_are_counted_and_said(spec, tokenizer, too_long, words):
    limited = changed(spec, max_length=66, too_long=too_long, sources=resized(spec, train=20))
    prepared = data.prepare(limited, tokenizer)
    assert max(len(ids) for ids in prepared.train["input_ids"]) <= 66
    note = data.notes(prepared, limited.data)[0]
    assert words in note


def test_rows_left_out_are_replaced_by_the_next_ones_drawn(spec, tokenizer):
    prepared = data.prepare(changed(spec, max_length=66, too_long="drop", sources=resized(spec, train=20)), tokenizer)
    assert len(prepared.train) == 20
    assert prepared.counts[0].train_dropped > 0


def test_too_few_rows_within_the_limit_are_an_error(spec, tokenizer):
    with pytest.raises(DataError, match=r"training rows within max_length \(66\) tokens, but train: 50 .* short"):
        data.prepare(changed(spec, max_length=66, too_long="drop", sources=resized(spec, train=50)), tokenizer)


def resized(spec, **changes):
    return [spec.plain()["data"]["sources"][0] | changes]


def test_a_row_without_an_answer_in_reach_still_trains_where_all_tokens_count(spec, tokenizer, tmp_path):
    tiny.write_rows(tmp_path / "long.jsonl", [{"prompt": "Why? " * 30, "completion": "So."}] * 40)
    path = spec.data.sources[0].path
    plain = changed(spec, max_length=80, sources=resized(spec, path=str(tmp_path / "long.jsonl"), test_path=path))
    plain = plain.plain()
    plain["train"]["loss"] = "all"
    prepared = data.prepare(TrialSpec.from_plain(plain), tokenizer)
    assert len(prepared.train) == 40
    assert {label for labels in prepared.train["labels"] for label in labels} == {data.IGNORED}


def test_no_row_within_the_limit_is_an_error(spec, tokenizer):
    everything = resized(spec, train=1.0)
    with pytest.raises(DataError, match="no train row has an answer within max_length"):
        data.prepare(changed(spec, max_length=8, sources=everything), tokenizer)


def test_a_tokenizer_without_template_is_refused_with_the_way_out(spec, tmp_path):
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(spec.model.name)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    plain = spec.plain()
    plain["model"]["tokenizer"] = str(tmp_path / "bare")
    with pytest.raises(ModelError, match="no chat template.*data.chat_template"):
        load_tokenizer(TrialSpec.from_plain(plain))
    (tmp_path / "mine.jinja").write_text(tiny.CHATML, encoding="utf-8")
    plain["data"]["chat_template"] = str(tmp_path / "mine.jinja")
    assert load_tokenizer(TrialSpec.from_plain(plain)).chat_template == tiny.CHATML


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(Unusable, match="rewrites earlier turns"):
        encode(Conversation(turns=TURNS), other)


def test_a_model_that_is_not_there_is_named(spec, tmp_path):
    from ray_peft.tasks.llm_sft.model import load_config

    for name, words in ((str(tmp_path / "gone"), "no such folder"), ("nobody/nothing", "cannot be loaded")):
        with pytest.raises(ModelError, match=words):
            load_config(spec.model.model_copy(update={"name": name}))
