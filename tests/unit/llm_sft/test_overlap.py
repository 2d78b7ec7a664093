"""Training rows that repeat held-out rows are found, different rows are not, and what is asked for happens."""

import json

import pytest
import tiny

from ray_peft.errors import DataError
from ray_peft.spec import ContaminationSpec, TrialSpec
from ray_peft.tasks.llm_sft import data
from ray_peft.tasks.llm_sft.overlap import Gate, HeldOutRow, Overlap, refusal
from ray_peft.tasks.llm_sft.recipes import Conversation
from ray_peft.tasks.llm_sft.rows import Row
from ray_peft.tasks.llm_sft.tokenizer import load_tokenizer

PASSAGE = "the harbour was closed for nine days because the northern ice had drifted further south than any pilot knew"


def row(number, *contents, file="f"):
    roles = ("user", "assistant") * len(contents)
    turns = tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=False))
    return Row(file, number, Conversation(turns=turns))


def found(train, held_out, others=(), split="test", **settings):
    """The kind of the pair that a training row makes with one held-out row, or null."""
    gate = Gate(
        [HeldOutRow("other", split, each) for each in (held_out, *others)], [train], ContaminationSpec(**settings)
    )
    offends = gate.offends("mine", train)
    overlap = gate.overlap()
    assert offends == bool(overlap.pairs) == bool(overlap.offending)
    return overlap.pairs[0].kind if overlap.pairs else None


@pytest.mark.parametrize(
    ("train", "held_out", "kind"),
    [
        (("What is  it?", "A CAT."), ("what is it?", "a cat."), "row"),
        (("What is it?", "A cat."), ("What is it?", "A dog."), None),
        (
            ("Tell me in short words why the sky is blue.", "Air scatters it."),
            ("tell me in short words why the SKY is blue.", "Because of Rayleigh."),
            "question",
        ),
        (("What is it?", PASSAGE), ("Why then?", f"{PASSAGE}!"), "near"),
        (
            ("What is it?", PASSAGE),
            ("Why?", "something else entirely that nobody had said in the harbour before"),
            None,
        ),
        # Scripts without spaces: each character is a word, and marks stay with their letters.
        (
            ("请翻译这一段", "天地玄黄宇宙洪荒日月盈昃辰宿列张"),
            ("请翻译", "天地玄黄宇宙洪荒日月盈昃辰宿列张。"),
            "near",
        ),
        (
            ("请翻译这一段", "天地玄黄宇宙洪荒日月盈昃辰宿列张"),
            ("请翻译", "寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨"),
            None,
        ),
        (("请告诉我天空为什么是蓝色的？", "散射。"), ("请告诉我天空为什么是蓝色的？", "因为光。"), "question"),
        (("你好吗？", "好。"), ("你好吗？", "不好。"), None),
        (("บอกฉันว่าทำไมท้องฟ้าเป็นสีฟ้า", "แสง"), ("บอกฉันว่าทำไมท้องฟ้าเป็นสีฟ้า", "ลม"), "question"),
        (
            ("What is it?", "हिन्दी में एक बहुत लम्बा और पूरा वाक्य है यह"),
            ("Why?", "हिन्दी में एक बहुत लम्बा और पूरा वाक्य है यह!"),
            "near",
        ),
        (
            ("In the series of books, who is the founder of House Tarly?", "Harlon the Hunter was, with his brother."),
            ("In the series of books, who is the founder of House Bulwer?", "Bors the Breaker is said to have been."),
            None,
        ),
    ],
)
def test_the_same_row_question_or_words_are_found_and_no_others(train, held_out, kind):
    assert found(row(1, *train), row(2, *held_out, file="g")) == kind


def test_a_conversation_that_goes_on_from_the_same_question_is_found():
    question = "How do I write an extension that works in both of these browsers?"
    train = row(1, question, "Use web extensions.")
    assert found(train, row(2, question, "Which ones?", "Both of them.", "Then use these.")) == "question"
    assert found(row(1, "Hi", "Hello", question, "Yes."), row(2, question, "No.")) == "near"


def test_a_piece_of_a_long_held_out_row_is_not_the_row():
    tail = " ".join(f"word{i}" for i in range(60))
    assert found(row(1, "Q?", PASSAGE), row(2, "Q?", f"{PASSAGE} {tail}")) is None
    assert found(row(1, "Q?", PASSAGE), row(2, "Q?", f"{PASSAGE} {tail}"), threshold=0.1) == "near"


def test_a_system_prompt_that_many_rows_share_is_no_overlap():
    prompts = [row(i, f"{PASSAGE}. Name number {i}.", f"n{i}", file="many") for i in range(12)]
    assert found(prompts[0], prompts[1], prompts[2:]) is None
    assert found(prompts[0], prompts[1], prompts[2:5]) == "near"
    assert found(prompts[0], prompts[0], prompts[2:]) == "row"


def test_text_without_turns_and_rows_in_other_scripts_are_compared():
    text = Row("f", 1, Conversation(text=f"{PASSAGE} \u00fc"))
    assert found(text, Row("g", 1, Conversation(text=f"{PASSAGE}; \u00dc"))) == "near"
    assert found(text, Row("g", 1, Conversation(text="short"))) is None


def test_words_are_cut_alike_in_ascii_and_beyond():
    from ray_peft.tasks.llm_sft.overlap import _words

    text = "".join(chr(code) for code in range(128)).lower() + " it's a_b 3.5"
    assert _words(f"{text} \u00fc") == [*_words(text), "\u00fc"]


def test_what_was_found_survives_json_and_is_told_with_the_way_out():
    gate = Gate([HeldOutRow("other", "validation", row(7, "Q?", PASSAGE))], [], ContaminationSpec())
    for number in range(12):
        assert gate.offends("mine", row(number, "Who?", PASSAGE))
    overlap = gate.overlap()
    assert Overlap.from_plain(json.loads(json.dumps(overlap.plain()))) == overlap
    assert overlap.groups == [
        {
            "train_source": "mine",
            "source": "other",
            "split": "validation",
            "kind": "near",
            "train_rows": 12,
            "held_out_rows": 1,
        }
    ]
    text = refusal(overlap)
    assert "12 training rows repeat held-out rows" in text
    assert text.count("repeats validation row 7 of other (near 92%): Q? the harbour") == 10
    assert "{action: drop}" in text


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(TrialSpec.from_plain(tiny.plain_spec(tiny_model, "d/d")))


@pytest.fixture
def two_sources(tiny_model, tmp_path):
    """Forty different rows; eight of them once more in a second source, as test rows and spares."""
    words = [" ".join(f"{stem}{i}" for stem in ("alpha", "beta", "gamma", "delta")) for i in range(60)]
    rows = [{"prompt": f"{word}?", "completion": f"{word} {word[::-1]} done."} for word in words]
    first = tiny.write_rows(tmp_path / "first.jsonl", rows[:40])
    second = tiny.write_rows(tmp_path / "second.jsonl", rows[32:])

    def spec(action, **changes):
        plain = tiny.plain_spec(tiny_model, first)
        source = plain["data"]["sources"][0]
        plain["data"]["sources"] = [
            {**source, "name": "a", "train": 20, "test": 4, **changes},
            {**source, "name": "b", "path": str(second), "train": 2, "test": 25},
        ]
        plain["data"]["contamination"] = {"action": action}
        return TrialSpec.from_plain(plain)

    return spec


def test_rows_that_repeat_those_of_another_source_fail_by_default(two_sources, tokenizer):
    spec = two_sources("fail")
    with pytest.raises(DataError, match=r"training rows repeat held-out rows.*\n.*a row \d+ repeats test row \d+ of b"):
        data.prepare(spec, tokenizer)
    assert ContaminationSpec().action == "fail"


def test_allowed_rows_are_trained_on_and_noted(two_sources, tokenizer):
    spec = two_sources("allow")
    prepared = data.prepare(spec, tokenizer)
    assert prepared.overlap.offending > 0
    assert shared_prompts(prepared, tokenizer)
    note = data.notes(prepared, spec.data)[-1]
    assert f"{prepared.overlap.offending} training rows repeat held-out rows and are trained on" in note


def test_dropped_rows_are_replaced_and_counted(two_sources, tokenizer):
    spec = two_sources("drop")
    prepared = data.prepare(spec, tokenizer)
    assert not shared_prompts(prepared, tokenizer)
    assert (prepared.counts[0].train, prepared.counts[1].train) == (20, 2)
    assert prepared.counts[0].overlap_dropped > 0
    assert (
        f"{prepared.counts[0].overlap_dropped} training rows left out that repeat" in data.notes(prepared, spec.data)[0]
    )
    again = data.prepare(spec, tokenizer)
    assert again.overlap == prepared.overlap
    assert again.overlap.offending == sum(each.overlap_dropped for each in prepared.counts)


def test_too_few_rows_in_their_place_say_why(two_sources, tokenizer):
    with pytest.raises(DataError, match=r"that repeat no held-out row \(\d+ do\), but train: 36 are asked for"):
        data.prepare(two_sources("drop", train=36), tokenizer)


def test_what_happens_to_the_rows_is_part_of_the_key(two_sources, tokenizer):
    dropped, allowed = (data.prepare(two_sources(a, validation=8), tokenizer) for a in ("drop", "allow"))
    assert dropped.key != allowed.key


def shared_prompts(prepared, tokenizer):
    """Test rows whose tokens are a training row."""
    train = {tuple(ids) for ids in prepared.train["input_ids"]}
    return [ids for ids in prepared.test["input_ids"] if tuple(ids) in train]
