"""What lies where the content of a file should be: nothing, a pointer to it, or a web page; each with the way out."""

from __future__ import annotations

import re
from pathlib import Path

HEAD = 512
"""First bytes of a file that tell."""

_SUBSTITUTES = (
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file itself; run `git lfs pull` in its folder"),
    (rb"[./a-z]*/annex/objects/", "a pointer of git-annex, not the file itself; run `git annex get` in its folder"),
    (rb"<!doctype|<html", "a web page, not the file itself; download it again (a login may be needed)"),
)


def substitute(head: bytes) -> str | None:
    """What the first bytes of a file show in place of its content, with the way out; None for anything else."""
    if not head:
        return "an empty file; download it again"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((text for pattern, text in _SUBSTITUTES if re.match(pattern, start)), None)


def substitute_in(file: Path) -> str | None:
    """The same of a file.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as opened:
        return substitute(opened.read(HEAD))
