"""A value is named by what it is, not by what happened to it: no variable, parameter or attribute is called `found`."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "ray_peft"

EMPTY = frozenset(
    {
        "asked", "done", "each", "found", "given", "got", "held", "kept", "made", "meant", "one", "said", "seen",
        "taken", "told", "wanted",
    }
)  # fmt: skip
"""Words that say nothing about a value: it was found, made, asked for."""


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that code gives to a value, with its line: variables, parameters, attributes, loop variables."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.arg(arg=name):
                yield name, node.lineno
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield name, node.lineno


def empty_names(source: str) -> list[str]:
    """The names without a meaning in a file, such as `line 3: found`."""
    return [f"line {line}: {name}" for name, line in names(ast.parse(source)) if name.strip("_") in EMPTY]


def test_values_are_named_by_what_they_are():
    paths = [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]
    assert paths
    assert [f"{path}: {line}" for path in paths for line in empty_names((PACKAGE / path).read_text("utf-8"))] == []


def test_the_check_sees_every_kind_of_name():
    source = """
def f(each, *, held=1):
    found = [one for one in each]
    with open(found) as made, g() as (told, rows):
        self._kept: int = 1
        rows.asked += (said := 2)
    for got, row in found:
        pass
    try:
        lambda given: given
    except ValueError as seen:
        pass
    match rows:
        case [taken, *wanted]:
            pass
"""
    names_in_it = {text.partition(": ")[2] for text in empty_names(source)}
    assert names_in_it == EMPTY - {"done", "kept", "meant"} | {"_kept"}
    assert empty_names("def found(rows):\n    return [row.kept for row in rows]\n") == []  # uses, and a function
