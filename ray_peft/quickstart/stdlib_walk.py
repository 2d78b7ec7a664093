"""Print every documented public callable of this Python's standard library as JSON.

Run as a script in its own interpreter (`python -I -S -B stdlib_walk.py`), because importing the whole standard library
disturbs the caller: signal handlers, codecs, thread pools. So this file imports nothing from ray_peft.
"""

import contextlib
import inspect
import io
import json
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any, TypedDict

# Left out: tests and demonstrations, modules that print or open a browser or window on import, modules present on some
# machines only (Tk, Windows), and the platform modules whose functions `os` and `os.path` publish.
SKIPPED_MODULES = (
    frozenset({"antigravity", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "this", "turtledemo", "venv"})
    | frozenset({"tkinter", "turtle", "xxlimited", "xxlimited_35", "xxsubtype"})
    | frozenset({"genericpath", "nt", "ntpath", "posix", "posixpath"})
)
SKIPPED_PARTS = frozenset({"test", "tests", "mp_main"})
# The name a reader knows, for objects whose `__module__` says where they are implemented.
PUBLISHED_AS = {"posix": "os", "nt": "os", "posixpath": "os", "ntpath": "os", "genericpath": "os"}
# What the import of a module for another platform raises, by experience.
IMPORT_FAILURES = (ImportError, OSError, AttributeError, RuntimeError, TypeError, ValueError, SystemExit)
METHOD_KINDS = {
    "classmethod": "class method",
    "classmethod_descriptor": "class method",
    "staticmethod": "static method",
    "builtin_function_or_method": "static method",
}
LONGEST_CALL = 80
"""Characters of `name(parameters)`; longer ones are reduced to the name."""


class Documented(TypedDict):
    """A callable with a docstring of its own."""

    module: str
    name: str
    kind: str
    call: str
    doc: str


def modules(skipped: list[str]) -> Iterator[tuple[str, ModuleType]]:
    """Import the public modules of the standard library, each with the name it is known by.

    Args:
        skipped: receives the names that cannot be imported or warn that they are deprecated.
    """
    waiting = sorted((sys.stdlib_module_names - SKIPPED_MODULES) | {"os.path"}, reverse=True)
    while waiting:
        name = waiting.pop()
        if any(part.startswith("_") or part in SKIPPED_PARTS for part in name.split(".")):
            continue
        module = imported(name)
        if module is None:
            skipped.append(name)
            continue
        yield name, module
        if "__path__" in vars(module):
            children = (f"{name}.{child.name}" for child in pkgutil.iter_modules(module.__path__))
            waiting.extend(sorted(children, reverse=True))


def imported(name: str) -> ModuleType | None:
    """The module, or None if it cannot be imported or is deprecated."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            module = import_module(name)
        except IMPORT_FAILURES:
            return None
    return None if any(issubclass(w.category, DeprecationWarning) for w in caught) else module


def public_members(place: str, module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The functions and classes that `module` owns or publishes from a private module, by name.

    Read from `vars`, so that no lazy attribute is computed.
    """
    published = "__all__" in vars(module)
    for name in sorted(module.__all__ if published else vars(module)):
        value = vars(module).get(name)
        if name.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
            continue
        owner = (getattr(value, "__module__", None) or place).split(".")[0]
        owner = PUBLISHED_AS.get(owner, owner)
        if owner == place.split(".")[0] or (published and owner.startswith("_")):
            yield name, value


def documented(place: str, module: ModuleType) -> Iterator[tuple[Any, Documented]]:
    """Each callable of `module`, its classes' methods included, with what is written about it."""
    for name, value in public_members(place, module):
        full_name = name if place == "builtins" else f"{place}.{name}"
        if not inspect.isclass(value):
            yield from described(value, value, place, full_name, "function")
            continue
        kind = "exception" if issubclass(value, BaseException) else "class"
        yield from described(value, value, place, full_name, kind)
        for method, entry in sorted(vars(value).items()):
            # `do_x` methods answer a command; their docstring is its help text, "p expression" for pdb.Pdb.do_p.
            if not method.startswith(("_", "do_")) and inspect.isroutine(entry):
                kind = METHOD_KINDS.get(str(type(entry).__name__), "method")
                yield from described(entry, getattr(value, method), place, f"{full_name}.{method}", kind)


def described(entry: Any, value: Any, place: str, name: str, kind: str) -> Iterator[tuple[Any, Documented]]:
    """The one description of `value`, or none if it has no docstring of its own."""
    doc = vars(value).get("__doc__") if inspect.isclass(value) else getattr(entry, "__doc__", None)
    if isinstance(doc, str) and doc.strip():
        call = name + signature(value, bound=kind == "method")
        doc = inspect.cleandoc(doc)
        row = Documented(module=place, name=name, kind=kind, call=call, doc=doc)
        yield entry, row if len(call) <= LONGEST_CALL else {**row, "call": name}


def signature(value: Any, *, bound: bool) -> str:
    """The parameters in parentheses without annotations; "" if there are none to be had or one has no plain default.

    Args:
        value: a function, method or class.
        bound: leave out the first parameter (`self`).
    """
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except (ValueError, TypeError, NameError, AttributeError):
        return ""
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters[bool(bound) :]]
    text = str(inspect.Signature(plain))
    # The default "<object object at 0x7f...>" differs between runs and tells a reader nothing.
    return "" if "<" in text else text


def walk() -> tuple[list[Documented], list[str]]:
    """All documented callables under their shortest public name, sorted by name, and the modules left out."""
    skipped: list[str] = []
    by_object: dict[int, tuple[Any, Documented]] = {}
    pairs = [pair for place, module in modules(skipped) for pair in documented(place, module)]
    for entry, row in sorted(pairs, key=lambda pair: (pair[1]["module"].count("."), pair[1]["name"])):
        by_object.setdefault(id(entry), (entry, row))
    return sorted((row for _, row in by_object.values()), key=lambda row: row["name"]), sorted(skipped)


if __name__ == "__main__":
    with contextlib.redirect_stdout(io.StringIO()):
        rows, left_out = walk()
    json.dump({"rows": rows, "skipped": left_out}, sys.stdout)
