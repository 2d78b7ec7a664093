"""What is imported for annotations alone is used in annotations alone: elsewhere it would fail when it runs.

Type checkers do not see that, and code that only a GPU reaches would fail there.
"""

import ast
from pathlib import Path

import pytest

import ray_peft

MODULES = sorted(Path(ray_peft.__file__).parent.rglob("*.py"))


def names_for_types(tree: ast.Module) -> set[str]:
    """Names that `if TYPE_CHECKING:` binds in the module."""
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {(alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names}


class Uses(ast.NodeVisitor):
    """Lines where one of `names` is used when the code runs."""

    def __init__(self, names: set[str]) -> None:
        self.bound = [names]
        self.lines: list[str] = []

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        imports = [each for each in ast.walk(node) if isinstance(each, ast.Import | ast.ImportFrom)]
        local = {(alias.asname or alias.name).partition(".")[0] for each in imports for alias in each.names}
        local |= {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
        for default in (*node.args.defaults, *node.args.kw_defaults, *node.decorator_list):
            if default is not None:
                self.visit(default)
        self.bound.append(self.bound[-1] - local)
        for statement in node.body:
            self.visit(statement)
        self.bound.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func) == "cast":  # its first argument is a type, mostly as text
            for argument in node.args[1:]:
                self.visit(argument)
            return
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in self.bound[-1]:
            self.lines.append(f"line {node.lineno}: {node.id}")


def found(text: str) -> list[str]:
    tree = ast.parse(text)
    uses = Uses(names_for_types(tree))
    for node in tree.body:
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            uses.visit(node)
    return uses.lines


def test_the_check_sees_a_missing_import():
    head = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
    assert found(f"{head}def f(x: torch.Tensor) -> torch.Tensor:\n    return torch.zeros(1)\n") == ["line 5: torch"]
    assert found(f"{head}def f(x: torch.Tensor):\n    import torch\n    y: torch.Tensor = torch.ones(1)\n") == []


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.name))
def test_names_for_annotations_stay_there(module):
    assert found(module.read_text(encoding="utf-8")) == []
