"""Answers side by side in a terminal."""

from ray_peft.chat import NARROWEST, columns, side_by_side


def test_answers_stand_in_columns_under_the_names_of_their_trials():
    lines = side_by_side(["lora-1 (lora)", "full-2 (full)"], ["one two three four five six seven", "a\nb"], 52)
    assert lines == [
        "lora-1 (lora)              full-2 (full)",
        "-------------              -------------",
        "one two three four five    a",
        "six seven                  b",
    ]


def test_chinese_characters_take_two_columns_and_long_words_are_broken():
    (_, _, *lines) = side_by_side(["a", "b"], ["\u4f60\u597d" * 10, "x" * 30], 2 * NARROWEST + 2)
    assert [columns(line.split("  ")[0]) for line in lines] == [24, 16]
    assert lines[0].endswith("x" * 24)
    assert lines[1].endswith("x" * 6)
    assert sum(line.count("\u4f60") for line in lines) == 10


def test_a_narrow_terminal_shows_one_below_the_other():
    assert side_by_side(["a", "b"], ["one", "two"], NARROWEST) == ["-- a", "one", "", "-- b", "two", ""]
