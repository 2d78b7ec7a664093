"""A first look at rows: which recipe, how many can be used, repeat others, and how long they are."""

import pytest
import tiny
from transformers import AutoTokenizer

from ray_peft.errors import DataError
from ray_peft.tasks.llm_sft.look import look

TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]


@pytest.fixture
def seen(tiny_model, tmp_path):
    """A function that looks at rows."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return lambda rows: look(str(tiny.write_rows(tmp_path / "rows.jsonl", rows)), tokenizer)


@pytest.mark.parametrize(
    ("row", "recipe"),
    [
        ({"instruction": "Who?", "input": "", "output": "I."}, "alpaca"),
        ({"instruction": "Who?", "output": "I.", "text": "### Who? I."}, "alpaca"),
        ({"instruction": "Who?", "context": "", "response": "I.", "category": "qa"}, "dolly"),
        ({"prompt": "Who?", "completion": "I.", "id": 3}, "prompt_completion"),
        ({"messages": TURNS}, "messages"),
        ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]}, "messages"),
        ({"prompt": "Who?", "messages": TURNS}, "messages"),  # as UltraChat has both
    ],
)
def test_the_recipe_is_recognised_from_the_fields(seen, row, recipe):
    first_look = seen([row] * 3)
    assert (first_look.recipe, first_look.rows, first_look.usable, first_look.repeated) == (recipe, 3, 3, 2)
    question, answer = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n", "I.<|im_end|>\n"
    markers = ("<|im_start|>", "<|im_end|>")
    text = question + answer
    for marker in markers:
        text = text.replace(marker, "*")
    assert first_look.length(0.5) == len(text)  # a byte is a token here
    assert first_look.answer_length(0.5) == len("I.*")


def test_rows_that_cannot_be_used_are_counted_by_reason(seen):
    good = [{"prompt": f"Who is {number}?", "completion": "I."} for number in range(4)]
    first_look = seen([*good, {"prompt": "Who?", "completion": " "}, {"prompt": "Who?"}])
    assert (first_look.rows, first_look.usable, first_look.repeated) == (6, 4, 0)
    assert first_look.unusable["empty answer"] == 1
    assert sum(first_look.unusable.values()) == 2


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"question": "Who?", "reply": "I."}], "its rows have the fields question, reply, which no recipe"),
        ([{"text": "Once upon a time"}], "fields text, which no recipe for questions and answers reads"),
        ([{"prompt": "Who?", "completion": ""}], "can use none of its 1 rows (1 rows: empty answer)"),
    ],
)
def test_rows_of_another_kind_are_one_clear_error(seen, rows, words):
    with pytest.raises(DataError) as caught:
        seen(rows)
    assert words in str(caught.value)
