"""An instruction set from the documentation of this Python: what does a callable do -> its first paragraph."""

import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypedDict

from ray_peft.errors import DataError
from ray_peft.quickstart.stdlib_walk import Documented

SEED = 0
TEST_SHARE = 0.15
ROWS_PER_MODULE = 16
"""Most rows from one top-level module, so that no package outweighs the rest."""
SHORTEST, LONGEST = 20, 400
"""Bounds on a completion, in characters."""
WALK_LIMIT_S = 300

QUESTIONS = (
    "What does the Python {kind} `{call}` do?",
    "In Python, what does the {kind} `{call}` do?",
    "Explain the Python {kind} `{call}`.",
    "Describe the Python {kind} `{call}`.",
)
QUESTIONS_ABOUT_CLASSES = (
    "What is the Python {kind} `{call}`?",
    "In Python, what is the {kind} `{call}` for?",
    "Explain the Python {kind} `{call}`.",
    "Describe the Python {kind} `{call}`.",
)

CALL = re.compile(r"(?:\w+\.)*(\w+)\s*\(")
ARROW = re.compile(r"\s*[-=]+>\s*")
SPOKEN = re.compile(r"(?:^|\s)--\s+|:\s+|^\s*-\s+")
CONTINUED = re.compile(r"\A\s*-+>.*\n?")
"""A return type on a line of its own, below the signature it belongs to."""
BLANK_LINES = re.compile(r"\n\s*\n")
OPENING = re.compile(r"[\w\"'`(*]")
NOT_PROSE = re.compile(r">>>|:$|:param|[-=]>|^\w+(, \w+)* ?=|^[a-z]\w*: ")
"""Sessions, introductions to lists, parameter fields, types, equations."""


class Row(TypedDict):
    """One question with its answer."""

    prompt: str
    completion: str
    module: str
    name: str


class Split(NamedTuple):
    """Rows to train on and rows to score; no top-level module and no completion is in both."""

    train: list[Row]
    test: list[Row]


def write(folder: Path) -> str:
    """Write train.jsonl and test.jsonl into `folder`, which exists. Returns a summary in one line."""
    documented, skipped = collect()
    split = build(documented)
    for name, rows in split._asdict().items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
    return (
        f"{len(split.train)} train and {len(split.test)} test rows from {len(documented)} docstrings of Python "
        f"{sys.version_info.major}.{sys.version_info.minor} ({len(skipped)} modules absent or deprecated)"
    )


def collect() -> tuple[list[Documented], list[str]]:
    """Walk the standard library in a separate interpreter: the documented callables, and the modules left out.

    Raises:
        DataError: that interpreter failed.
    """
    script = Path(__file__).with_name("stdlib_walk.py")
    command = [sys.executable, "-I", "-S", "-B", str(script)]
    try:
        process = subprocess.run(
            command, capture_output=True, check=True, stdin=subprocess.DEVNULL, timeout=WALK_LIMIT_S
        )
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise DataError(f"the walk over the standard library of {sys.executable} failed: {reason}") from error
    except subprocess.TimeoutExpired as error:
        raise DataError(f"the walk over the standard library took more than {WALK_LIMIT_S} s") from error
    walk = json.loads(process.stdout)
    return walk["rows"], walk["skipped"]


def build(documented: Iterable[Documented], *, seed: int = SEED) -> Split:
    """Rows from docstrings, shuffled and split by top-level module; the same for the same input and seed."""
    rows = [
        Row(prompt=question(entry), completion=answer, module=entry["module"], name=entry["name"])
        for entry in sorted(documented, key=lambda entry: entry["name"])
        if (answer := first_paragraph(entry["doc"], entry["name"])) is not None
    ]
    random.Random(seed).shuffle(rows)
    rows = limited(distinct(rows))
    held_out = test_modules(Counter(top_level(row) for row in rows), seed)
    return Split(
        train=[row for row in rows if top_level(row) not in held_out],
        test=[row for row in rows if top_level(row) in held_out],
    )


def question(entry: Documented) -> str:
    """The user's turn: one of a few wordings, fixed by the callable's name."""
    wordings = QUESTIONS_ABOUT_CLASSES if entry["kind"] in ("class", "exception") else QUESTIONS
    return wordings[hashed(entry["name"]) % len(wordings)].format(kind=entry["kind"], call=entry["call"])


def first_paragraph(doc: str, name: str) -> str | None:
    """The first paragraph of prose, its white space collapsed; None if it is not there or of unsuitable length."""
    for paragraph in BLANK_LINES.split(doc):
        text = " ".join(without_signatures(paragraph, name.rpartition(".")[2]).split())
        if text:
            prose = OPENING.match(text) and text.count(" ") >= 2 and not NOT_PROSE.search(text)
            return text if prose and SHORTEST <= len(text) <= LONGEST else None
    return None


def without_signatures(paragraph: str, name: str) -> str:
    """`paragraph` less the lines `name(...) -> type` at its start, which older C code writes into docstrings."""
    text = paragraph.strip()
    while call := CALL.match(text):
        line, _, below = after_parentheses(text).partition("\n")
        arrow = ARROW.match(line)
        if not arrow and call.group(1) != name:
            return text
        remainder = line[arrow.end() :] if arrow else line.removesuffix(":")
        if remainder.count("(") > remainder.count(")"):
            return ""  # the type goes on below: "-> (tm_year, tm_mon, / tm_mday)"
        spoken = SPOKEN.search(remainder)
        if spoken:
            return f"{remainder[spoken.end() :]}\n{below}"
        if arrow and below.lstrip()[:1].islower() and not CALL.match(below.lstrip()):
            return f"{remainder}\n{below}"  # one sentence over two lines: "-> create an iterator which ... / for ..."
        if remainder.strip() and not arrow:
            return text  # prose that begins with the call: "foo(x) returns ..."
        text = CONTINUED.sub("", below).strip()
    return text.partition(": ")[2] if text.partition(": ")[0].rpartition(".")[2] == name else text


def after_parentheses(text: str) -> str:
    """What follows the first balanced (...) of `text`; "" if it never closes."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and character == ")":
            return text[place + 1 :]
    return ""


def distinct(rows: Iterable[Row]) -> list[Row]:
    """The first row of each wording of an answer (letters and digits compared, case ignored)."""
    first_rows: dict[str, Row] = {}
    for row in rows:
        first_rows.setdefault(re.sub(r"\W+", " ", row["completion"]).casefold().strip(), row)
    return list(first_rows.values())


def limited(rows: Iterable[Row]) -> list[Row]:
    """At most ROWS_PER_MODULE rows of each top-level module, the first ones."""
    counts: Counter[str] = Counter()
    chosen = []
    for row in rows:
        counts[top_level(row)] += 1
        if counts[top_level(row)] <= ROWS_PER_MODULE:
            chosen.append(row)
    return chosen


def test_modules(rows_of: Counter[str], seed: int) -> set[str]:
    """Top-level modules to hold out: taken in hashed order while they fit into TEST_SHARE of the rows."""
    room = TEST_SHARE * rows_of.total()
    held_out = set()
    for module in sorted(rows_of, key=lambda name: hashed(f"{seed}:{name}")):
        if rows_of[module] <= room:
            held_out.add(module)
            room -= rows_of[module]
    return held_out


def top_level(row: Row) -> str:
    """The part of the module's name before the first dot."""
    return row["module"].partition(".")[0]


def hashed(text: str) -> int:
    """A number that depends on `text` alone (`hash` differs between processes)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
