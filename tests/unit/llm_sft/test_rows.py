"""Splits are drawn disjoint, and rows that cannot be used are counted and named."""

import pytest
import tiny

from ray_peft.errors import DataError
from ray_peft.spec import SourceSpec
from ray_peft.tasks.llm_sft.rows import draw

EARLIER = ["q4", "q6", "q1", "q3", "q5", "q0", "q7", "q2"]
"""Test and training rows of eight, drawn with seed 42 before there were validation rows."""


def source(path, **changes):
    return SourceSpec(recipe="prompt_completion", path=str(path), **{"train": 4, "test": 2, **changes})


def numbered(path, count):
    return tiny.write_rows(path, [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(count)])


def texts(rows):
    return [row.conversation.turns[0]["content"] for row in rows]


def sizes(drawn):
    return len(drawn.train) if drawn.train_count is None else drawn.train_count, len(drawn.test)


def test_splits_are_disjoint_seeded_and_repeat(tmp_path):
    spec = source(numbered(tmp_path / "r.jsonl", 20), train=10, test=5)
    first, again, other = draw(spec, 1), draw(spec, 1), draw(spec, 2)
    assert texts(first.train) == texts(again.train)
    assert texts(first.train) != texts(other.train)
    assert not set(texts(first.train)) & set(texts(first.test))
    assert (sizes(first), first.read) == ((10, 5), 20)


def test_one_percent_of_dolly_s_rows_gives_14860_and_151(tmp_path):
    drawn = draw(source(numbered(tmp_path / "r.jsonl", 15_011), train=1.0, test=0.01), 0)
    assert sizes(drawn) == (14_860, 151)


@pytest.mark.parametrize(("rows", "train", "test"), [(12, 0.9, 0.1), (100, 0.93, 0.07), (100, 0.5, 0.1)])
def test_fractions_of_both_splits_fit_together(tmp_path, rows, train, test):
    drawn = draw(source(numbered(tmp_path / "r.jsonl", rows), train=train, test=test), 0)
    assert sum(sizes(drawn)) <= rows


def test_validation_rows_come_from_between_and_leave_the_other_splits_as_they_were(tmp_path):
    path = numbered(tmp_path / "r.jsonl", 20)
    without, having = draw(source(path, train=10, test=5), 1), draw(source(path, train=10, test=5, validation=3), 1)
    assert without.validation == []
    assert having.test == without.test
    assert having.validation + having.train == without.train
    assert len(having.validation) == 3


def test_the_drawn_rows_of_a_seed_are_those_of_earlier_versions(tmp_path):
    drawn = draw(source(numbered(tmp_path / "r.jsonl", 8), train=4, test=2), 42)
    assert texts(drawn.test + drawn.train) == EARLIER


def test_fractions_of_three_splits_fit_together_and_1_0_means_the_rest(tmp_path):
    path = numbered(tmp_path / "r.jsonl", 10)
    parts = draw(source(path, train=0.7, test=0.15, validation=0.15), 0)
    assert (sizes(parts), len(parts.validation)) == ((7, 2), 1)
    rest = draw(source(path, train=1.0, test=2, validation=0.2), 0)
    assert (sizes(rest), len(rest.validation)) == ((6, 2), 2)


def test_validation_rows_come_from_the_training_file_where_the_test_has_its_own(tmp_path):
    train, test = numbered(tmp_path / "train.jsonl", 6), numbered(tmp_path / "test.jsonl", 3)
    drawn = draw(source(train, test_path=str(test), train=1.0, test=3, validation=2), 0)
    assert {row.file for row in drawn.validation} == {str(train)}
    assert (sizes(drawn), len(drawn.validation)) == ((4, 3), 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"validation": 5}, "has 4 usable rows for validation, but validation: 5 are asked for; 1 short"),
        ({"validation": 2, "train": 3}, "has 2 usable rows for train, but train: 3 are asked for; 1 short"),
        ({"validation": 0.05}, "validation: .* of its rows is less than one; raise .validation."),
    ],
)
def test_too_few_rows_for_validation_are_an_error(tmp_path, changes, words):
    with pytest.raises(DataError, match=words):
        draw(source(numbered(tmp_path / "r.jsonl", 6), **changes), 0)


def test_a_row_drawn_twice_is_an_internal_error_and_not_a_score(tmp_path, monkeypatch):
    monkeypatch.setattr("random.Random.shuffle", lambda _, rows: rows.append(rows[0]))
    with pytest.raises(DataError, match="row 1 of source prompt_completion was drawn for test and again for train"):
        draw(source(numbered(tmp_path / "r.jsonl", 6), train=5), 0)


def test_the_training_file_is_no_test_file(tmp_path):
    path = numbered(tmp_path / "r.jsonl", 6)
    with pytest.raises(DataError, match="names this file as path and as test_path.*leave test_path out"):
        draw(source(path, test_path=f"{tmp_path}/./r.jsonl"), 0)


def test_a_test_file_of_its_own(tmp_path):
    train, test = numbered(tmp_path / "train.jsonl", 6), numbered(tmp_path / "test.jsonl", 3)
    drawn = draw(source(train, test_path=str(test), train=6, test=3), 0)
    assert sizes(drawn) == (6, 3)


def test_too_few_rows_say_how_many_are_short(tmp_path):
    with pytest.raises(DataError, match="has 4 usable rows for train, but train: 6 are asked for; 2 short"):
        draw(source(numbered(tmp_path / "r.jsonl", 6), train=6, test=2), 0)


def test_a_source_without_a_usable_row_says_that_it_is_empty_and_why(tmp_path):
    rows = [{"prompt": "q", "completion": None}, {"prompt": " ", "completion": "a"}, {"prompt": "q", "completion": ""}]
    path = tiny.write_rows(tmp_path / "r.jsonl", rows)
    words = (
        r"is empty after filtering: .* none of its 3 rows \(2 x empty answer: rows 1, 3, 1 x empty question: row 2\)"
    )
    with pytest.raises(DataError, match=words):
        draw(source(path), 0)


def test_a_row_of_another_shape_is_named(tmp_path):
    path = tiny.write_rows(tmp_path / "r.jsonl", [{"prompt": "q", "completion": "a"}, {"prompt": "q"}])
    words = "row 2 does not fit recipe prompt_completion: field 'completion'.*data.unusable: skip"
    with pytest.raises(DataError, match=words):
        draw(source(path), 0)


BAD_LINES = {
    "field 'completion' must be text (found int)": '{"prompt": "q", "completion": 7}',
    "field 'completion' must be text (found nothing)": '{"prompt": "q"}',
    "not valid JSON": '{"prompt": "q", "compl',
    "bytes that are not UTF-8": b'{"prompt": "q", "completion": "caf\xe9"}',
    "a key twice in one object": '{"prompt": "q", "completion": "a", "completion": "b"}',
    "not a JSON object": "[1]",
    "nested too deeply": '{"prompt": "q", "completion": ' + "[" * 100_000,
    "a number of too many digits": '{"prompt": "q", "completion": ' + "9" * 5000 + "}",
    "a lone surrogate, which is half a character": r'{"prompt": "q \ud83d", "completion": "a"}',
    "a NUL character": r'{"prompt": "q", "completion": "\u0000"}',
    "empty answer": '{"prompt": "q", "completion": null}',
}


@pytest.fixture
def mixed(tmp_path):
    """Ten good rows, each followed by a bad one."""
    lines = []
    for number, line in enumerate(BAD_LINES.values()):
        good = f'{{"prompt": "q{number}", "completion": "a"}}'.encode()
        lines += [good, line if isinstance(line, bytes) else line.encode()]
    path = tmp_path / "mixed.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


def test_bad_rows_of_many_are_skipped_counted_and_named(mixed):
    drawn = draw(source(mixed, train=1.0), 0, "skip")
    assert drawn.unusable == dict.fromkeys(BAD_LINES, 1)
    assert drawn.read == 2 * len(BAD_LINES)
    numbers = [2 * index + 2 for index in range(len(BAD_LINES))]
    assert drawn.left_out.named() == {
        reason: f"row {number}" for reason, number in zip(BAD_LINES, numbers, strict=True)
    }
    assert sorted(texts(drawn.train + drawn.test)) == sorted(f"q{number}" for number in range(len(BAD_LINES)))


def test_errors_about_too_few_rows_say_which_rows_cannot_be_used(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "" if i % 2 else "a"} for i in range(14)]
    path = tiny.write_rows(tmp_path / "r.jsonl", rows)
    words = r"has 5 usable rows for train.*; 7 rows are unusable \(7 x empty answer: rows 2, 4, 6, 8, 10 and 2 more\)"
    with pytest.raises(DataError, match=words):
        draw(source(path, train=10, test=2), 0)


def test_unusable_rows_of_two_files_are_told_apart(tmp_path):
    bad = {"prompt": "q", "completion": ""}
    train = tiny.write_rows(
        tmp_path / "train.jsonl", [{"prompt": f"q{i}", "completion": "a"} for i in range(6)] + [bad]
    )
    test = tiny.write_rows(tmp_path / "test.jsonl", [{"prompt": "t", "completion": "a"}, bad])
    drawn = draw(source(train, test_path=str(test), train=2, test=1), 0)
    assert drawn.left_out.named() == {"empty answer": "row 7, row 2 of test.jsonl"}


def test_a_shard_of_the_training_folder_is_no_test_file(tmp_path):
    for number in range(2):
        numbered(tmp_path / f"part-{number}.jsonl", 6)
    with pytest.raises(DataError, match="would be tested on rows that it trains on"):
        draw(source(tmp_path, test_path=str(tmp_path / "part-1.jsonl")), 0)


def test_rows_of_a_folder_are_counted_through_its_shards(tmp_path):
    numbered(tmp_path / "part-0.jsonl", 3)
    tiny.write_rows(
        tmp_path / "part-1.jsonl", [{"prompt": "p3", "completion": "a"}, {"prompt": "p4", "completion": ""}]
    )
    drawn = draw(source(tmp_path, train=2), 0)
    assert {row.number: texts([row])[0] for row in drawn.train + drawn.test} == {1: "q0", 2: "q1", 3: "q2", 4: "p3"}
    assert drawn.left_out.named() == {"empty answer": "row 2 of part-1.jsonl"}
