"""Pairs and labelled rows in the layouts of public data sets, and those that cannot be used."""

import json
import re

import pytest
import tiny

from ray_peft.errors import DataError
from ray_peft.spec import TrialSpec
from ray_peft.tasks.llm_sft.conversation import Unusable, WrongShape
from ray_peft.tasks.llm_sft.data import prepare
from ray_peft.tasks.llm_sft.encode import IGNORED
from ray_peft.tasks.llm_sft.judged import labelled, preference
from ray_peft.tasks.llm_sft.tokenizer import load_tokenizer


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


PAIR = ((user("Q"), assistant("good")), (user("Q"), assistant("bad")))
LAYOUTS = {
    "texts": {"prompt": "Q", "chosen": " good ", "rejected": "bad"},
    "turns apart": {"prompt": [user("Q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
    "ultrafeedback_binarized": {
        "prompt": "Q", "prompt_id": "1", "chosen": list(PAIR[0]), "rejected": list(PAIR[1]),
        "messages": list(PAIR[0]), "score_chosen": 8.0, "score_rejected": 2.0,
    },
    "whole chats without prompt": {"chosen": list(PAIR[0]), "rejected": list(PAIR[1])},
    "ShareGPT": {
        "prompt": "Q", "chosen": [{"from": "gpt", "value": "good"}], "rejected": [{"from": "gpt", "value": "bad"}]
    },
    "hh-rlhf": {
        "chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad",
    },
    "hh-rlhf with its prompt apart": {
        "prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " good", "rejected": " bad", "response": "good"
    },
    "question": {"system": "", "question": "Q", "chosen": "good", "rejected": "bad"},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_of_every_layout_are_read(layout):
    conversation = preference(LAYOUTS[layout])
    assert (conversation.turns, conversation.rejected) == PAIR
    assert [side.turns for side in conversation.sides()] == list(PAIR)
    assert conversation.plain() == {"chosen": list(PAIR[0]), "rejected": list(PAIR[1])}


def test_orca_s_system_text_goes_into_the_question():
    row = {"system": "Be brief.", "question": "Q", "chosen": "good", "rejected": "bad"}
    assert preference(row).turns[0] == preference(row).rejected[0] == user("Be brief.\n\nQ")


def test_the_turns_that_both_sides_share_are_the_prompt():
    start = "\n\nHuman: One?\n\nAssistant: Yes.\n\nHuman: Two?\n\nAssistant: "
    conversation = preference({"chosen": start + "Both.", "rejected": start + "No.\n\nNever."})
    assert conversation.untrained == {1}
    assert conversation.rejected[-1] == assistant("No.\n\nNever.")


REFUSED = {
    "no pair": ({"prompt": "Q", "completion": "A"}, "field 'chosen' must be text or a list of turns .found nothing"),
    "no prompt": ({"chosen": "good", "rejected": "bad"}, "chosen is an answer alone, .*'prompt' or 'question'"),
    "a number": ({"prompt": "Q", "chosen": "good", "rejected": 3}, "field 'rejected' must be .* \\(found int"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_of_another_shape_are_refused_by_field(case):
    row, text = REFUSED[case]
    with pytest.raises(WrongShape, match=text):
        preference(row)


HOPELESS = {
    "equal": ({"prompt": "Q", "chosen": "same", "rejected": "same "}, "chosen and rejected are equal"),
    "empty": ({"prompt": "Q", "chosen": "good", "rejected": " "}, "empty rejected answer"),
    "empty turn": ({"prompt": "Q", "chosen": [assistant("")], "rejected": "bad"}, "empty chosen answer"),
    "no turns": ({"prompt": "Q", "chosen": [], "rejected": "bad"}, "empty chosen answer"),
    "no answer": ({"prompt": "Q", "chosen": [user("more")], "rejected": "bad"}, "does not end with"),
    "another prompt": (
        {"chosen": [user("A"), assistant("x")], "rejected": [user("B"), assistant("y")]}, "answer different prompts"
    ),
    "one begins the other": (
        {"chosen": list(PAIR[0]), "rejected": [*PAIR[0], user("And?"), assistant("no")]}, "is the beginning of"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOPELESS)
def test_pairs_without_a_preference_are_unusable_by_reason(case):
    row, reason = HOPELESS[case]
    with pytest.raises(Unusable, match=reason):
        preference(row)


@pytest.mark.parametrize(("label", "desirable"), [(True, True), (0, False), ("TRUE", True), ("0", False), (1, True)])
def test_labels_of_every_file_format_are_read(label, desirable):
    conversation = labelled({"prompt": "Q", "completion": "A", "label": label})
    assert conversation.turns == (user("Q"), assistant("A"))
    assert conversation.desirable is desirable


@pytest.mark.parametrize("label", [None, 2, "good", 0.5, [True]])
def test_a_label_that_is_neither_true_nor_false_is_refused(label):
    with pytest.raises(WrongShape, match="field 'label' must be true or false"):
        labelled({"prompt": "Q", "completion": "A", "label": label})


def prepared(model, path, rows, recipe="preference", **changes):
    sizes = {"train": len(rows) - 3, "test": 2} if len(rows) > 4 else {"train": 1, "test": 1}
    objective = "kto" if recipe == "labelled" else "dpo"
    plain = tiny.plain_spec(model, tiny.write_rows(path, rows), train__objective=objective, **changes)
    plain["data"]["sources"] = [{"recipe": recipe, "path": str(path), **sizes}]
    spec = TrialSpec.from_plain(plain)
    return prepare(spec, load_tokenizer(spec))


def test_both_sides_become_tokens_and_unusable_pairs_are_counted(tiny_model, tmp_path):
    rows = [{"prompt": f"Say {n}.", "chosen": f"yes {n}", "rejected": f"no, {n}"} for n in range(8)]
    rows.append({"prompt": "Say it.", "chosen": "same", "rejected": "same"})
    data = prepared(tiny_model, tmp_path / "rows.jsonl", [*rows, rows[0] | {"prompt": "Other"}])
    row = data.train[0]
    for ids, labels in (("input_ids", "labels"), ("rejected_ids", "rejected_labels")):
        scored = [place for place, label in enumerate(row[labels]) if label != IGNORED]
        assert [row[ids][place] for place in scored] == [row[labels][place] for place in scored]
        assert scored == list(range(scored[0], scored[-1] + 1))
    shared = min(place for place, label in enumerate(row["labels"]) if label != IGNORED)
    assert row["input_ids"][:shared] == row["rejected_ids"][:shared]
    assert data.counts[0].unusable == {"chosen and rejected are equal": 1}
    assert data.test[0]["reference"].startswith("yes")


def test_a_pair_that_is_equal_within_the_limit_is_left_out(tiny_model, tmp_path):
    begin = "x" * 60
    rows = [{"prompt": f"Say {n}.", "chosen": f"yes {n}", "rejected": f"no, {n}"} for n in range(8)]
    late = [{"prompt": f"Say {n}.", "chosen": begin + "a", "rejected": begin + "b"} for n in range(100, 103)]
    with pytest.raises(DataError, match=r"source preference has \d+ training rows within max_length \(64\) tokens"):
        prepared(tiny_model, tmp_path / "rows.jsonl", rows + late, data__max_length=64)


def test_a_file_without_pairs_is_one_error_that_names_file_row_and_field(tiny_model, tmp_path):
    rows = [{"prompt": f"Say {n}.", "completion": "A"} for n in range(8)]
    with pytest.raises(DataError, match=r"rows\.jsonl: row 1 does not fit recipe preference: field 'chosen' must be"):
        prepared(tiny_model, tmp_path / "rows.jsonl", rows)


def test_a_file_of_equal_sides_is_empty_after_filtering(tiny_model, tmp_path):
    rows = [{"prompt": f"Say {n}.", "chosen": "A", "rejected": "A"} for n in range(8)]
    with pytest.raises(DataError, match="empty after filtering: .*8 x chosen and rejected are equal: rows 1, 2, 3"):
        prepared(tiny_model, tmp_path / "rows.jsonl", rows)


OBJECTIVE_PROBLEMS = {
    "dpo on answers": ({"train__objective": "dpo"}, "train.objective: dpo needs recipe preference .found prompt_compl"),
    "a setting of another": ({"train__preference": {"beta": 0.3}}, "train.preference.beta is no setting of .* sft"),
    "smoothing of ipo": (
        {"train__objective": "dpo", "train__preference": {"loss": "ipo", "label_smoothing": 0.1}},
        "label_smoothing .0.1. is no setting of loss ipo",
    ),
    "trl": (
        {"train__objective": "dpo", "train__engine": "trl"},
        "train.engine: trl runs TRL's SFTTrainer, which has no",
    ),
    "all tokens": ({"train__objective": "dpo", "train__loss": "all"}, "compares answers, so that train.loss: all"),
    "weights": (
        {"train__objective": "orpo", "train__preference": {"desirable_weight": 2.0}},
        "desirable_weight is no setting of train.objective: orpo",
    ),
}


@pytest.mark.parametrize("case", OBJECTIVE_PROBLEMS)
def test_settings_that_contradict_the_objective_are_refused_with_the_way_out(case):
    changes, text = OBJECTIVE_PROBLEMS[case]
    plain = tiny.plain_spec("m/m", "d/d", **changes)
    if case != "dpo on answers":
        plain["data"]["sources"][0]["recipe"] = "preference"
    with pytest.raises(ValueError, match=text):
        TrialSpec.from_plain(plain)


def test_sft_refuses_rows_of_which_some_are_bad():
    plain = tiny.plain_spec("m/m", "d/d")
    plain["data"]["sources"][0]["recipe"] = "labelled"
    with pytest.raises(ValueError, match="would train on undesirable answers of recipe labelled"):
        TrialSpec.from_plain(plain)


def test_written_rows_show_both_sides(tiny_model, tmp_path):
    from ray_peft.tasks.llm_sft import describe

    rows = [{"prompt": f"Say {n}.", "chosen": f"yes {n}", "rejected": f"no, {n}"} for n in range(8)]
    plain = tiny.plain_spec(tiny_model, tiny.write_rows(tmp_path / "rows.jsonl", rows), train__objective="dpo")
    plain["data"]["sources"][0] |= {"recipe": "preference", "train": 5, "test": 2}
    spec = TrialSpec.from_plain(plain)
    folder = tmp_path / "out"
    folder.mkdir()
    describe.write(spec, folder)
    first = json.loads((folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert (first["chosen"][-1]["content"][:3], first["rejected"][-1]["content"][:3]) == ("yes", "no,")
    assert "yes" in first["rendered"]
    assert "no," in first["rendered_rejected"]
    text = (folder / "examples" / "preference_example.txt").read_text(encoding="utf-8")
    assert "---------- rejected: trained on ----------\nno," in text
    train = describe.report(spec).splits[0]
    prepared_rows = prepare(spec, load_tokenizer(spec)).train
    assert train.tokens == sum(len(row["input_ids"]) + len(row["rejected_ids"]) for row in prepared_rows)


BALANCES = {
    "even": (20, 20, {}, ""),
    "few are good": (10, 30, {}, "weigh 0.33 times.*desirable_weight to 3.00 to 4.00"),
    "few are good, with a weight": (10, 30, {"desirable_weight": 3.5}, ""),
    "many are good": (30, 10, {}, "weigh 3.00 times.*desirable_weight to 0.33 to 0.44"),
    "all are good": (40, 0, {}, "all 40 training rows are desirable"),
}


@pytest.mark.parametrize("case", BALANCES)
def test_kto_rows_out_of_balance_are_a_caution(case):
    from datasets import Dataset

    from ray_peft.tasks.llm_sft.preference.rows import cautions

    good, bad, weights, text = BALANCES[case]
    plain = tiny.plain_spec("m/m", "d/d", train__objective="kto", train__preference=weights)
    plain["data"]["sources"][0]["recipe"] = "labelled"
    sentences = cautions(TrialSpec.from_plain(plain), Dataset.from_dict({"desirable": [True] * good + [False] * bad}))
    assert len(sentences) == bool(text)
    assert re.search(text, " ".join(sentences))
