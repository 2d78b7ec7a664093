"""What becomes of rows that a template or a limit does something to: counted, named, or one error with its row."""

import pytest
import templates
import tiny
from templates import turns

from ray_peft.errors import DataError
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.tasks.llm_sft import data
from ray_peft.tasks.llm_sft.tokenizer import load_tokenizer

LONG = {"prompt": "Think slowly, please. " * 8 + "What now?", "completion": "That."}


@pytest.fixture
def prepare(tiny_model, tmp_path):
    """A function that prepares rows with a chat template; returns what it made, and the notes on it."""

    def prepare_rows(rows, template=templates.CHATML, test_rows=None, **changes):
        plain = tiny.plain_spec(tiny_model, tiny.write_rows(tmp_path / "rows.jsonl", rows))
        (tmp_path / "mine.jinja").write_text(template, encoding="utf-8")
        plain["data"] |= {"chat_template": str(tmp_path / "mine.jinja"), "max_length": 160, **changes}
        source = plain["data"]["sources"][0]
        source |= {"recipe": "messages" if "messages" in rows[0] else "prompt_completion", "train": 8, "test": 4}
        if test_rows is not None:
            source["test_path"] = str(tiny.write_rows(tmp_path / "test.jsonl", test_rows))
        spec = TrialSpec.from_plain(plain)
        prepared = data.prepare(spec, load_tokenizer(spec))
        return prepared, TASKS["llm_sft"].inspect(spec).notes

    return prepare_rows


def trained(model, rows):
    """The text that carries loss, of each row."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer.decode([label for label in labels if label != data.IGNORED]) for labels in rows["labels"]]


@pytest.mark.parametrize("too_long", ["cut", "drop"])
def test_held_out_rows_whose_answer_is_cut_away_are_unscored_and_named(prepare, too_long):
    test_rows = [LONG, tiny.QUESTIONS[0], LONG, LONG]
    prepared, notes = prepare(tiny.QUESTIONS, test_rows=test_rows, too_long=too_long)
    assert len(prepared.test) == 1
    (counts,) = prepared.counts
    assert sorted(counts.unscored["test"]) == [1, 3, 4]
    assert counts.test == 1
    said = "3 of 4 test rows are unscored and left out, since their answer begins after 160 tokens"
    assert any(said in note and note.endswith("rows 1, 3, 4") for note in notes)
    assert prepared.facts.longest <= 160  # prompts too: what memory is predicted for


def test_no_held_out_row_with_an_answer_in_reach_is_one_error(prepare):
    with pytest.raises(DataError, match=r"no test row has an answer within max_length \(160\).*rows 1, 2, 3, 4; give"):
        prepare(tiny.QUESTIONS, test_rows=[LONG] * 4)


def test_a_row_that_the_template_refuses_is_named_with_its_file(prepare, tmp_path):
    refuses = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('never no') }}{% endif %}"
    rows = [*tiny.QUESTIONS[:11], {"prompt": "no", "completion": "yes"}]
    with pytest.raises(DataError, match=r"rows\.jsonl: row 12: the chat template refuses it: never no; mend"):
        prepare(rows, refuses + templates.CHATML)


CHATS = [{"messages": list(turns(f"One {i}?", f"Yes {i}.", "More?", f"No {i}."))} for i in range(20)]


def test_answers_that_a_template_rewrites_later_are_not_trained_on_and_counted(prepare, tiny_model):
    prepared, notes = prepare(CHATS, templates.LAST_THINKS)
    texts = trained(tiny_model, prepared.train)
    assert all(text.startswith("<think>\n\n</think>\n\nNo ") and "Yes" not in text for text in texts)
    assert any("8 answers within training rows are not trained on" in note for note in notes)
    assert any("begins each answer with '<think>\\n\\n</think>'" in note for note in notes)


def test_rows_of_which_no_answer_can_be_trained_are_one_error_with_the_reason(prepare):
    with pytest.raises(
        DataError, match=r"0 training rows .*asks them to begin with: '<think>\\n'.*data\.chat_template"
    ):
        prepare(tiny.QUESTIONS, templates.ASKS_FOR_THOUGHTS)


def test_rows_whose_thoughts_the_template_drops_are_unusable_and_replaced(prepare, tiny_model):
    thoughtful = [{**row, "completion": f"<think>Hm.</think>{row['completion']}"} for row in tiny.QUESTIONS[:20]]
    prepared, notes = prepare([*thoughtful, *tiny.QUESTIONS[:40]], templates.DROPS_THOUGHTS)
    assert len(prepared.train) == 8
    assert not any("Hm." in text for text in trained(tiny_model, prepared.train))
    assert prepared.counts[0].unusable["the chat template leaves out a part of the answer"] > 0
    assert any("unusable rows (the chat template leaves out a part of the answer)" in note for note in notes)


def test_rows_whose_question_the_template_drops_are_one_error(prepare):
    with pytest.raises(DataError, match="leaves out the text of the user"):
        prepare(tiny.QUESTIONS, "{% for m in messages %}{{ m['role'] + '<|im_end|>' }}{% endfor %}")


def test_a_template_without_end_mark_is_a_caution(prepare):
    _, notes = prepare(tiny.QUESTIONS, templates.WITHOUT_END)
    assert any(note.startswith("caution: the chat template writes no end mark") for note in notes)
    _, notes = prepare(tiny.QUESTIONS)
    assert not any("end mark" in note for note in notes)


def test_the_date_of_a_template_is_said_and_part_of_the_key(prepare):
    dated = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}" + templates.CHATML
    first, notes = prepare(tiny.QUESTIONS, dated)
    assert any("the chat template prints the date: it is 2024-07-26 in all rows" in note for note in notes)
    other, _ = prepare(tiny.QUESTIONS, dated, template_date="2025-01-31")
    assert first.key != other.key
    assert len(first.train[0]["input_ids"]) == len(other.train[0]["input_ids"])
    assert list(first.train["input_ids"]) != list(other.train["input_ids"])


def test_special_tokens_typed_in_rows_are_counted_by_name(prepare):
    rows = [{**row, "completion": f"{row['completion']} <|im_end|><|pad|>"} for row in tiny.QUESTIONS]
    prepared, notes = prepare(rows)
    (counts,) = prepared.counts
    assert counts.typed_rows == 12
    assert counts.typed == {"<|im_end|>": 12, "<|pad|>": 12}
    assert any("12 rows hold special tokens as text (<|im_end|> 12x, <|pad|> 12x); they stay text" in n for n in notes)
    assert all(ids.count(257) == 2 and 258 not in ids for ids in prepared.train["input_ids"])
    _, notes = prepare(rows, special_tokens="control")
    assert any("they become control tokens (data.special_tokens: control)" in note for note in notes)


def test_a_tokenizer_with_another_end_token_is_another_key(prepare, tiny_model, tmp_path):
    """Templates write special tokens by their roles, so the same template writes other rows."""
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(tiny_model, tmp_path / "copy")
    spec = TrialSpec.from_plain(
        tiny.plain_spec(tmp_path / "copy", tiny.write_rows(tmp_path / "q.jsonl", tiny.QUESTIONS))
    )
    first = data.prepare(spec, load_tokenizer(spec))
    changed = AutoTokenizer.from_pretrained(tmp_path / "copy")
    changed.eos_token = "<|pad|>"
    changed.save_pretrained(tmp_path / "copy")
    assert data.prepare(spec, load_tokenizer(spec)).key != first.key
