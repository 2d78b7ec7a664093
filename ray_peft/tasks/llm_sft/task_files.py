"""The user's own task files for lm-eval, read as text: which of them run Python code when lm-eval loads them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import yaml

_TAG = "!function"


def python_in(folder: Path) -> tuple[Path, int, str] | None:
    """The first task file in a folder, or included by one there, that names Python code: file, line, what it names.

    lm-eval imports the code while it reads the file, before anything of the task is known.
    """
    waiting, visited = sorted(folder.rglob("*.yaml")), set[Path]()
    while waiting:
        file = waiting.pop(0).resolve()
        if file in visited:
            continue
        visited.add(file)
        with contextlib.suppress(OSError):  # lm-eval says which one cannot be read
            text = file.read_text(encoding="utf-8", errors="replace")
            if (tagged := _tagged(text)) is not None:
                return file, *tagged
            waiting += [file.parent / name for name in _included(text)]
    return None


def _tagged(text: str) -> tuple[int, str] | None:
    """Line and text of the first value that names code."""
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            tag = getattr(event, "tag", None)
            if isinstance(tag, str) and tag.startswith(_TAG):
                mark = event.start_mark
                return (mark.line + 1 if mark else 1), f"{_TAG} {getattr(event, 'value', '')}".strip()
    except yaml.YAMLError:  # lm-eval may read on where this cannot
        for number, line in enumerate(text.splitlines(), 1):
            if _TAG in line:
                return number, line.strip()
    return None


def _included(text: str) -> Iterator[str]:
    """The files that a task file includes."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if key.value == "include":
            entries = value.value if isinstance(value, yaml.SequenceNode) else [value]
            yield from (entry.value for entry in entries if isinstance(entry, yaml.ScalarNode))
