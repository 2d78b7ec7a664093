"""Field rules of each source."""

import pytest

from ray_peft.tasks.llm_sft.recipes import RECIPES, Unusable, WrongShape


def pair(question, answer):
    return ({"role": "user", "content": question}, {"role": "assistant", "content": answer})


@pytest.mark.parametrize(
    ("recipe", "row", "turns"),
    [
        ("alpaca", {"instruction": " Sum ", "input": "", "output": "ok "}, pair("Sum", "ok")),
        ("alpaca", {"instruction": "Sum", "input": "1 2", "output": "3"}, pair("Sum\n\nInput: 1 2", "3")),
        ("alpaca", {"instruction": "Sum", "output": "3"}, pair("Sum", "3")),
        ("dolly", {"instruction": "Who?", "context": "Text.", "response": "He."}, pair("Who?\n\nText.", "He.")),
        ("dolly", {"instruction": "Who?", "context": "", "response": "He."}, pair("Who?", "He.")),
        ("prompt_completion", {"prompt": "a", "completion": "b"}, pair("a", "b")),
    ],
)
def test_fields_become_turns(recipe, row, turns):
    assert RECIPES[recipe](row).turns == turns


def test_system_text_goes_before_the_user_turn_that_follows_it():
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "Human", "content": "Hi"},
            {"role": "gpt", "content": "Hello"},
        ]
    }
    assert RECIPES["messages"](row).turns == pair("Be brief.\n\nHi", "Hello")


@pytest.mark.parametrize(
    ("order", "turns"),
    [
        ("S Q A", ("S\n\nQ", "A")),
        ("S T Q A", ("S\n\nT\n\nQ", "A")),
        ("Q S A", ("S\n\nQ", "A")),
        ("Q S A P B", ("S\n\nQ", "A", "P", "B")),
        ("Q A S P B", ("Q", "A", "S\n\nP", "B")),
        ("Q A S", ("Q", "A")),
    ],
)
def test_system_text_stays_with_what_it_instructs(order, turns):
    roles = {"S": "system", "T": "System ", "Q": "USER", "P": "human", "A": "gpt", "B": "assistant"}
    found = RECIPES["tulu"]({"messages": [{"role": roles[each], "content": f" {each}\n"} for each in order.split()]})
    assert tuple(turn["content"] for turn in found.turns) == turns
    assert [turn["role"] for turn in found.turns] == ["user", "assistant"] * (len(turns) // 2)


def test_empty_turns_are_dropped():
    row = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": " "},
            {"role": "assistant", "content": None},
            {"role": "assistant", "content": "Hello"},
        ]
    }
    assert RECIPES["messages"](row).turns == pair("Hi", "Hello")


@pytest.mark.parametrize(
    ("recipe", "row", "reason"),
    [
        ("alpaca", {"instruction": "x", "output": " "}, "empty answer"),
        ("alpaca", {"instruction": "x", "output": None}, "empty answer"),
        ("dolly", {"instruction": "", "response": "x"}, "empty question"),
        ("messages", {"messages": []}, "no turns"),
        ("messages", {"messages": [{"role": "assistant", "content": "x"}]}, "does not start with the user"),
        ("messages", {"messages": [{"role": "user", "content": "x"}]}, "does not end with the assistant"),
        (
            "messages",
            {"messages": [{"role": r, "content": "x"} for r in ("user", "user", "assistant")]},
            "roles do not alternate",
        ),
        ("text", {"text": " "}, "empty text"),
    ],
)
def test_rows_with_nothing_to_learn_are_counted_under_a_reason(recipe, row, reason):
    with pytest.raises(Unusable, match=reason):
        RECIPES[recipe](row)


@pytest.mark.parametrize(
    ("recipe", "row", "words"),
    [
        ("alpaca", {"question": "x"}, "field 'instruction' must be text .found nothing; the row has question"),
        ("dolly", {"instruction": "x", "response": 3}, "field 'response' must be text .found int"),
        ("messages", {"messages": "x"}, "field 'messages' must be a list .found str"),
        ("messages", {"messages": [{"role": "critic", "content": "x"}]}, r"messages\[0\].role is 'critic'"),
        ("messages", {"messages": ["x"]}, r"messages\[0\] must be a mapping"),
    ],
)
def test_rows_of_another_shape_name_the_field(recipe, row, words):
    with pytest.raises(WrongShape, match=words):
        RECIPES[recipe](row)
