"""The instruction set built from this Python's own documentation."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ray_peft.quickstart import stdlib_docs
from ray_peft.quickstart.stdlib_docs import Split, first_paragraph
from ray_peft.quickstart.stdlib_walk import Documented

FILES = ("train.jsonl", "test.jsonl")


@pytest.fixture(scope="module")
def documented() -> dict[str, Documented]:
    return {one["name"]: one for one in stdlib_docs.collect()[0]}


@pytest.fixture(scope="module")
def split(documented: dict[str, Documented]) -> Split:
    return stdlib_docs.build(documented.values())


def test_it_is_large_enough_and_about_15_percent_is_held_out(split: Split) -> None:
    total = len(split.train) + len(split.test)
    assert total > 1_200
    assert 0.12 < len(split.test) / total <= stdlib_docs.TEST_SHARE


def test_train_and_test_share_no_module_completion_or_prompt(split: Split) -> None:
    for key in (stdlib_docs.top_level, lambda row: row["completion"].casefold(), lambda row: row["prompt"]):
        assert not {key(row) for row in split.train} & {key(row) for row in split.test}


def test_prompts_and_completions_are_distinct(split: Split) -> None:
    rows = split.train + split.test
    for field in ("prompt", "completion", "name"):
        assert len({row[field] for row in rows}) == len(rows)


def test_completions_are_prose_of_the_right_length_on_one_line(split: Split) -> None:
    for row in split.train + split.test:
        assert stdlib_docs.SHORTEST <= len(row["completion"]) <= stdlib_docs.LONGEST, row
        assert row["completion"] == " ".join(row["completion"].split()), row
        assert not re.search(r"[-=]>|>>>", row["completion"]), row
        assert not re.fullmatch(r"[\w.]+\([^()]*\)", row["completion"]), row


def test_prompts_quote_the_call_and_hold_no_memory_address(split: Split) -> None:
    for row in split.train + split.test:
        assert f"`{row['name']}" in row["prompt"], row
        assert " at 0x" not in row["prompt"], row


def test_no_module_outweighs_the_rest(split: Split) -> None:
    modules = [stdlib_docs.top_level(row) for row in split.train + split.test]
    assert max(map(modules.count, set(modules))) <= stdlib_docs.ROWS_PER_MODULE


@pytest.mark.parametrize(
    ("name", "call", "kind", "answer"),
    [
        (
            "shutil.copyfile",
            "shutil.copyfile(src, dst, *, follow_symlinks=True)",
            "function",
            "Copy data from src to dst in the most efficient way possible.",
        ),
        ("math.cos", "math.cos(x, /)", "function", "Return the cosine of x (measured in radians)."),
        ("str.title", "str.title()", "method", "Return a version of the string where each word is titlecased."),
        ("os.path.isabs", "os.path.isabs(s)", "function", "Test whether a path is absolute"),
        ("queue.Empty", "queue.Empty", "exception", "Exception raised by Queue.get(block=0)/get_nowait()."),
        ("textwrap.TextWrapper.fill", "textwrap.TextWrapper.fill(text)", "method", None),
    ],
)
def test_rows_checked_by_hand(documented: dict[str, Documented], name: str, call: str, kind: str, answer: str) -> None:
    one = documented[name]
    assert (one["call"], one["kind"]) == (call, kind)
    if answer:
        assert first_paragraph(one["doc"], name) == answer
    assert f"{kind} `{call}`" in stdlib_docs.question(one)


@pytest.mark.parametrize("name", ["posixpath.join", "tkinter.Tk", "this.s", "asyncio.queues.Queue", "dict.__len__"])
def test_private_duplicate_and_unwanted_names_are_left_out(documented: dict[str, Documented], name: str) -> None:
    assert name not in documented


@pytest.mark.parametrize(
    ("doc", "answer"),
    [
        ("S.find(sub[, start[, end]]) -> int", None),
        ("find(a, b)", None),
        ("S.find(sub[, start]) -> int\n\nReturn the lowest index of sub.", "Return the lowest index of sub."),
        ("find(a) -> x\nfind(a, b) -> y\n\nReturn the lowest index.", "Return the lowest index."),
        ("find(a,\n     b) -> x\n\nReturn the lowest index.", "Return the lowest index."),
        ("find(a)\n  -> list of (x, y)\n\nReturn the lowest index.", "Return the lowest index."),
        ("find(a) -> (x,\n  y)\n\nReturn the lowest index.", "Return the lowest index."),
        ("find(a) -> x -- return the lowest index", "return the lowest index"),
        ("find(a) -> return the first\nfor this a.", "return the first for this a."),
        ("find(a) returns the lowest index.", "find(a) returns the lowest index."),
        ("alias(a) -> x\n\nReturn the lowest index.", "Return the lowest index."),
        ("Return the\n   lowest   index.\n\nMore of it.", "Return the lowest index."),
        (">>> find(1) and more\n2", None),
        ("The arguments are these:\n\n- a", None),
        ("Too short.", None),
        ("long " * 90, None),
    ],
)
def test_first_paragraph_is_prose_without_the_signature(doc: str, answer: str | None) -> None:
    assert first_paragraph(doc, "module.find") == answer


def test_two_processes_with_different_hash_seeds_write_the_same_bytes(tmp_path: Path) -> None:
    script = "import sys, pathlib; from ray_peft.quickstart import stdlib_docs as s; s.write(pathlib.Path(sys.argv[1]))"
    root = str(Path(stdlib_docs.__file__).parents[2])
    digests = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root}
        subprocess.run([sys.executable, "-c", script, str(folder)], check=True, env=environment, timeout=120)
        assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
        digests.append([hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES])
    assert digests[0] == digests[1]


def test_each_line_is_one_json_object_with_four_texts(tmp_path: Path) -> None:
    summary = stdlib_docs.write(tmp_path)
    lines = [line for name in FILES for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
    assert summary.isascii()
    for line in lines:
        row = json.loads(line)
        assert list(row) == ["prompt", "completion", "module", "name"]
        assert all(isinstance(value, str) and value for value in row.values())
