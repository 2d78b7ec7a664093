"""Imports go one way: a room imports only rooms below it, inside functions too, and nothing imports in a circle."""

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "ray_peft"

ROOMS = (
    # the bottom
    "errors", "foundation",
    # what one trial is
    "reach", "metrics", "methods", "spec", "space",
    # one trial
    "vram", "engine", "tasks", "checks", "trial",
    # many trials: what is kept of them, what it says, and what runs where
    "store", "report", "schedule", "compare", "live",
    # what people call
    "export", "chat", "data_report", "clean", "quickstart", "doctor", "console",
    "cli_arguments", "cli_jobs", "cli_kept", "cli_live", "cli", "__main__", "",
)  # fmt: skip
"""From the bottom up: folders and files of ray_peft; "" is ray_peft itself."""


@dataclass(frozen=True)
class Import:
    """One module of ray_peft imports another; both without `ray_peft.`."""

    importer: str
    imported: str
    line: int
    runs: bool
    """False under `if TYPE_CHECKING:`."""


def room(module: str) -> str:
    return module.partition(".")[0]


def name_of(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(package: Path) -> list[Import]:
    """Every import of one module of the package by another, wherever it stands."""
    modules = {name_of(path, package): path for path in sorted(package.rglob("*.py"))}
    top = package.name
    found = []
    for importer, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        blocks = [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ]
        never_run = {id(inner) for block in blocks for statement in block.body for inner in ast.walk(statement)}
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: line {node.lineno}: a relative import"
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name.removeprefix(f"{top}.") in modules else str(node.module) for name in inner]
            for name in dict.fromkeys(names):
                imported = "" if name == top else name.removeprefix(f"{top}.")
                if (name == top or name.startswith(f"{top}.")) and imported != importer:
                    found.append(Import(importer, imported, node.lineno, id(node) not in never_run))
    return found


def upward(imports: Iterable[Import], rooms: tuple[str, ...]) -> list[str]:
    """Imports of a room that is not below the importer's own."""
    return [
        f"{each.importer}, line {each.line}: imports {each.imported} of the room {room(each.imported)!r} above it"
        for each in imports
        if room(each.importer) != room(each.imported)
        and rooms.index(room(each.importer)) < rooms.index(room(each.imported))
    ]


def circles(imports: Iterable[Import]) -> list[list[str]]:
    """Groups of modules that import each other, at whatever distance."""
    edges: dict[str, set[str]] = {}
    for each in imports:
        edges.setdefault(each.importer, set()).add(each.imported)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        rest = [start]
        while rest:
            for following in edges.get(rest.pop(), set()) - seen:
                seen.add(following)
                rest.append(following)
        return seen

    reaches = {module: reached(module) for module in edges}
    groups = {
        tuple(sorted(other for other in there if module in reaches.get(other, set())))
        for module, there in reaches.items()
        if module in there
    }
    return [list(group) for group in sorted(groups)]


@pytest.fixture(scope="module")
def imports() -> list[Import]:
    return imports_of(PACKAGE)


def test_every_file_is_in_a_room():
    rooms = {room(name_of(path, PACKAGE)) for path in PACKAGE.rglob("*.py")}
    assert rooms == set(ROOMS), "give a new room its place in ROOMS, and take one that is gone away"
    assert len(set(ROOMS)) == len(ROOMS)


def test_no_room_imports_one_above_it(imports):
    assert upward(imports, ROOMS) == []


def test_no_modules_import_each_other(imports):
    assert circles(each for each in imports if each.runs) == []


def test_no_task_knows_another(imports):
    own = [(each, each.importer.split("."), each.imported.split(".")) for each in imports]
    foreign = [
        f"{each.importer}, line {each.line}: imports {each.imported}"
        for each, importer, imported in own
        if importer[0] == imported[0] == "tasks"
        and (PACKAGE / "tasks" / imported[-1 if len(imported) == 1 else 1]).is_dir()
        and importer[1:2] not in ([], imported[1:2])  # the registry, and the task itself
    ]
    assert foreign == []


def test_the_check_sees_imports_inside_functions(tmp_path):
    package = tmp_path / "house"
    (package / "cellar").mkdir(parents=True)
    for folder in (package, package / "cellar"):
        (folder / "__init__.py").touch()
    (package / "cellar" / "jam.py").write_text("def f():\n    from house import attic\n")
    (package / "attic.py").write_text("from house.cellar.jam import f\n")
    imports = imports_of(package)
    assert upward(imports, ("cellar", "attic", "")) == [
        "cellar.jam, line 2: imports attic of the room 'attic' above it"
    ]
    assert circles(imports) == [["attic", "cellar.jam"]]
