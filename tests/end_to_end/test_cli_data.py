"""`ray-peft data`: what became of the rows, as a table, as JSON and as files."""

import json
import re

import pytest
import tiny
import yaml

from ray_peft import cli

ROWS = [{"prompt": f"Who lives at number {i} \u00fc?", "completion": f"{'xyz'[i % 3] * 9} {i * i}."} for i in range(40)]


@pytest.fixture
def space(tiny_model, tmp_path, monkeypatch):
    """A function that writes a search space on two sources, with its data, into the current folder."""
    monkeypatch.chdir(tmp_path)
    tiny.write_rows(tmp_path / "homes.jsonl", [*ROWS, {"prompt": "?", "completion": " "}])
    pairs = [[(row["prompt"].upper()[:-3], "user"), (row["completion"], "assistant")] for row in ROWS]
    turns = [[{"role": role, "content": content} for content, role in pair] for pair in pairs]
    tiny.write_rows(tmp_path / "chats.jsonl", [{"messages": each} for each in turns])

    def write(**changes):
        plain = tiny.plain_spec(tiny_model, "homes.jsonl")
        plain["data"] = {
            "sources": [
                {"recipe": "prompt_completion", "name": "homes/1", "path": "homes.jsonl", "train": 8, "test": 4},
                {"recipe": "messages", "path": "chats.jsonl", "train": 6, "test": 3, "validation": 2},
            ],
            "max_length": 96,
            **changes,
        }
        plain["method"] = {"grid": [{"name": "none"}, {"name": "lora", "rank": 4}]}
        (tmp_path / "space.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
        return "space.yaml"

    return write


def test_the_table_counts_rows_and_tokens_in_plain_ascii(space, capsys):
    assert cli.main(["data", space(max_length=52)]) == 0
    text = capsys.readouterr().out
    assert text.isascii()
    lines = [line.split() for line in text.splitlines()]
    assert "2 trials" in text
    assert "homes/1: 41 rows read; 1 unusable (empty answer)" in text
    (train,) = [line for line in lines if line[:2] == ["homes/1", "train"]]
    assert (train[2], train[3], train[8]) == ("8", "8", "52")
    assert [line[1] for line in lines if line[:1] == ["messages"] and len(line) == 10] == [
        "train",
        "validation",
        "test",
    ]


def test_json_and_files_hold_the_rows_as_the_model_sees_them(space, tmp_path, capsys):
    assert cli.main(["data", space(), "--json", "--out", "shown"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "shown" / "data.json").read_text(encoding="utf-8")) == [found]
    sizes = {(each["source"], each["split"]): each["rows"] for each in found["splits"]}
    assert sizes["homes/1", "train"] == 8
    assert sizes["messages", "validation"] == 2
    for split, count in (("train", 14), ("validation", 2), ("test", 7)):
        lines = (tmp_path / "shown" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == count
        for row in map(json.loads, lines):
            question, answer = (turn["content"] for turn in row["messages"])
            assert row["rendered"].startswith(f"<|im_start|>user\n{question}<|im_end|>")
            assert answer in row["rendered"]
    assert "\u00fc" in (tmp_path / "shown" / "train.jsonl").read_text(encoding="utf-8")
    tokens = sum(each["tokens"] for each in found["splits"] if each["split"] == "validation")
    lines = (tmp_path / "shown" / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    bytes_and_markers = sum(
        len(json.loads(line)["rendered"].replace("<|im_start|>", "*").replace("<|im_end|>", "*").encode())
        for line in lines
    )
    assert tokens == bytes_and_markers  # a byte is a token here


@pytest.mark.parametrize(("loss", "parts"), [("answers", ["not trained on", "trained on"]), ("all", ["trained on"])])
def test_examples_say_which_part_is_trained_on(space, tmp_path, loss, parts):
    assert cli.main(["data", space(), "--set", f"train.loss={loss}", "--out", "shown"]) == 0
    assert {path.name for path in (tmp_path / "shown" / "examples").iterdir()} == {
        "homes_1_example.txt",
        "messages_example.txt",
    }
    text = (tmp_path / "shown" / "examples" / "homes_1_example.txt").read_text(encoding="utf-8")
    first = text.split("==========")[2]
    blocks = first.split("---------- ")[1:]
    assert [block.split(" -----")[0] for block in blocks][: len(parts)] == parts
    answer = blocks[len(parts) - 1]
    assert answer.split("----------\n")[1].rstrip().endswith(".<|im_end|>")
    assert ("Who lives" in answer) == (loss == "all")


def test_each_distinct_data_set_is_reported_once(space, tmp_path, capsys):
    assert cli.main(["data", space(max_length={"grid": [60, 80]}), "--json", "--out", "shown"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["settings"]["max_length"] for each in found] == [60, 80]
    assert [each["trials"] for each in found] == [2, 2]
    for each in found:
        assert (tmp_path / "shown" / each["key"] / "train.jsonl").is_file()


def test_rows_that_a_template_does_something_to_are_said_by_data_and_plan(space, tmp_path, capsys):
    dated = "{{ strftime_now('%d %b %Y') }}" + tiny.CHATML.replace("<|im_end|>", "")
    (tmp_path / "mine.jinja").write_text(dated, encoding="utf-16")
    rows = [{**row, "completion": f"{row['completion']} <|im_end|>"} for row in ROWS]
    tiny.write_rows(tmp_path / "homes.jsonl", [*rows, {"prompt": "Who? " * 40, "completion": "I."}])
    name = space(chat_template="mine.jinja", max_length=120)
    said = [
        "homes/1: 12 rows hold special tokens as text (<|im_end|> 12x); they stay text",
        "the chat template prints the date: it is 2024-07-26 in all rows",
        "caution: the chat template writes no end mark after an answer",
    ]
    assert cli.main(["data", name]) == 0
    table = capsys.readouterr().out
    assert cli.main(["plan", name]) == 0
    plan = capsys.readouterr().out
    assert [words for words in said if f"rows: {words}" not in table] == []
    assert [words for words in said if words not in plan] == []
    assert cli.main(["data", name, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert all(any(line.startswith(words) for line in found["remarks"]) for words in said)
    assert cli.main(["plan", name, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2  # JSON alone


@pytest.mark.parametrize("command", ["plan", "data", "sweep"])
@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ broken", "mine.jinja: the chat template is not valid Jinja: line 1"),
        ("{{ raise_exception('never') }}", "row [0-9]+: the chat template refuses it: never; .*data.chat_template"),
        (
            "{{ messages[0].content + nobody }}",
            "row [0-9]+: the chat template refuses it: 'nobody' is undefined",
        ),
    ],
)
def test_a_template_that_fails_is_one_error_of_every_command(space, tmp_path, capsys, command, template, words):
    (tmp_path / "mine.jinja").write_text(template, encoding="utf-8")
    assert cli.main([command, space(chat_template="mine.jinja")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{words}", line)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_contamination_is_exit_code_2_with_the_report(space, tmp_path, capsys, options):
    tiny.write_rows(tmp_path / "homes.jsonl", [ROWS[0]] * 20)
    assert cli.main(["data", space(), "--out", "shown", *options]) == 2
    captured = capsys.readouterr()
    assert "error: data.contamination: 8 training rows repeat held-out rows (found: 8 row)" in captured.err
    if options:
        (found,) = json.loads(captured.out)
        assert (found["key"], found["overlap"]["offending"]) == (None, 8)
    else:
        assert "overlap: homes/1 -> test of homes/1: 8 training rows repeat 4 held-out rows (row)" in captured.out
    assert [path.name for path in (tmp_path / "shown").iterdir()] == ["data.json"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "data.max_lenght=9"], "unknown key, did you mean max_length?"),
        (["--set", "model.tokenizer=./gone"], "gone: no such folder"),
        (["--out", "space.yaml"], "--out space.yaml: cannot be written: File exists"),
    ],
)
def test_bad_input_is_one_clear_error(space, capsys, options, words):
    assert cli.main(["data", space(), *options]) == 2
    assert words in capsys.readouterr().err


def test_a_sweep_stops_at_contamination_before_anything_starts(space, tmp_path, capsys):
    tiny.write_rows(tmp_path / "homes.jsonl", [ROWS[0]] * 20)
    assert cli.main(["sweep", space()]) == 2
    assert "repeat held-out rows" in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()
