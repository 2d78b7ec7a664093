"""The documents: their search spaces are valid, their commands are ours, what they name exists, and examples run."""

from __future__ import annotations

import ast
import gzip
import json
import random
import re
import shlex
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import yaml
from untracked import run

import ray_peft
from ray_peft import cli
from ray_peft.space import read as space

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
WHOLE = """
model: {name: some/model}
data: {sources: [{recipe: dolly, path: hub/rows, train: 10, validation: 4, test: 2}]}
method: {name: lora}
train: {steps: 5, batch_size: 8, micro_batch_size: 4}
"""
"""A search space, for documents that show a part of one."""


def blocks(document: Path, language: str) -> list[str]:
    """The fenced blocks of a document in a language; "" stands for none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


EXAMPLES = [
    pytest.param(page, text, id=f"{page.stem}-{number}")
    for page in DOCUMENTS
    for number, text in enumerate(blocks(page, "yaml"))
]


def commands(document: Path) -> Iterator[str]:
    """Command lines in its blocks, and those with arguments inside its sentences."""
    for text in blocks(document, ""):
        yield from (line for line in text.splitlines() if re.match(r"(\w+=\S* )*ray-peft ", line))
    prose = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    yield from (code for code in re.findall(r"`([^`\n]+)`", prose) if re.match(r"ray-peft \w+ ", code))


def is_whole(text: str) -> bool:
    return "model" in yaml.safe_load(text)


def heading_names(document: Path) -> set[str]:
    """The names that links give to its headings."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture
def named(monkeypatch, tmp_path):
    """Values for the variables that examples name."""
    monkeypatch.setenv("RAY_PEFT_DATA", str(tmp_path))
    monkeypatch.setenv("RAY_PEFT_VAN_GOGH", str(tmp_path))


def test_every_page_has_an_example_and_is_found_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"](docs/{page.name}" in readme
        assert blocks(page, "yaml"), f"{page.name} shows no search space"
        assert list(commands(page)), f"{page.name} shows no command"


@pytest.mark.parametrize(("page", "text"), EXAMPLES)
def test_search_spaces_in_documents_are_valid(page, text, named):
    plain = yaml.safe_load(text)
    whole = text if is_whole(text) else yaml.safe_dump({**yaml.safe_load(WHOLE), **plain})
    for profile in (None, *plain.get("profiles", {})):
        assert space.parse(whole, f"docs/{page.name}", profile=profile).trials


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_commands_in_documents_are_taken_by_the_command_line(document):
    for line in commands(document):
        words = shlex.split(line, comments=True)
        own = words[words.index("ray-peft") + 1 :]
        options = cli._parser().parse_args(own[: own.index("|")] if "|" in own else own)
        for path in (getattr(options, name, None) or "" for name in ("space", "spec")):
            if path.startswith("search_spaces/"):
                space.load(ROOT / path, getattr(options, "overrides", []), getattr(options, "profile", None))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_what_documents_link_to_or_name_exists(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, heading = target.partition("#")
        file = (document.parent / name).resolve() if name else document
        assert file.exists(), f"{document.name}: {target}"
        assert not heading or heading in heading_names(file), f"{document.name}: {target}"
    for name in re.findall(r"`((?:ray_peft|tests|benchmarks|search_spaces|jobs|docs)/[\w./]*)`", text):
        assert (ROOT / name).exists(), f"{document.name}: {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_python_in_documents_uses_what_the_package_has(document):
    for text in blocks(document, "python"):
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
        names = [node.attr for node in calls if isinstance(node.value, ast.Name) and node.value.id == "ray_peft"]
        assert names
        assert all(hasattr(ray_peft, name) for name in names)


def words(generator: random.Random, count: int) -> str:
    return " ".join("".join(generator.choices(string.ascii_lowercase, k=4)) for _ in range(count))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """A folder with the files of rows that the examples name; each row is another one."""
    folder = tmp_path_factory.mktemp("rows")
    generator = random.Random(0)
    asked = [(words(generator, 5), words(generator, 4)) for _ in range(1500)]
    dolly = [{"instruction": question, "context": "", "response": answer} for question, answer in asked]
    with gzip.open(folder / "dolly.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in dolly)
    turns = [
        [{"role": "user", "content": words(generator, 6)}, {"role": "assistant", "content": words(generator, 4)}]
        for _ in range(20)
    ]
    tiny.write_rows(folder / "chats.jsonl", [{"messages": chat} for chat in turns])
    return folder


# An example that names rows of the hub is checked without them, above.
RUNNABLE = [example for example in EXAMPLES if is_whole(example.values[1]) and "tatsu-lab" not in example.values[1]]


@pytest.mark.parametrize(("page", "text"), RUNNABLE)
def test_examples_run_up_to_the_start(page, text, request, monkeypatch, tmp_path, capsys):
    if "text_to_image" in text:
        monkeypatch.setenv("RAY_PEFT_SD15", str(request.getfixturevalue("tiny_painter")))
        monkeypatch.setenv("RAY_PEFT_PAINTINGS", str(request.getfixturevalue("paintings")))
        smaller = ["--set", "data.test=2", "--set", "data.resolution=32"]
    else:
        monkeypatch.setenv("RAY_PEFT_MODEL", str(request.getfixturevalue("tiny_model")))
        monkeypatch.setenv("RAY_PEFT_DATA", str(request.getfixturevalue("rows")))
        smaller = []
    file = tmp_path / f"{page.stem}.yaml"
    file.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", str(file), *smaller]) == 0
    assert cli.main(["plan", str(file), *smaller]) == 0
    assert "trials, checked" in capsys.readouterr().out


def test_the_trial_of_how_it_works_trains_and_is_scored(rows, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_PEFT_MODEL", str(tiny_model))
    monkeypatch.setenv("RAY_PEFT_DATA", str(rows))
    (text,) = blocks(ROOT / "docs" / "how_it_works.md", "yaml")
    (trial,) = space.parse(text, "how_it_works.md").trials
    row, _ = run(trial, tmp_path / "trial")
    assert (row.status, row.steps) == ("finished", 4), row.error
    assert row.scores.eval_loss is not None
    assert row.scores.generated_rows == 4
    # What results.md says of a trial's folder.
    names = {path.name for path in (tmp_path / "trial").iterdir()}
    assert names >= {"metrics.jsonl", "samples.jsonl", "answers.jsonl", "losses.jsonl", "adapter"}


def test_the_tasks_of_make_and_bootstrap_in_documents_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split())
    tasks = set(re.findall(r"^    ([\w-]+)   ", (ROOT / "bootstrap.py").read_text(encoding="utf-8"), re.MULTILINE))
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)?)\b(?=`|  )", text)) <= targets
        assert set(re.findall(r"bootstrap\.py ([a-z]+)", text)) <= tasks
