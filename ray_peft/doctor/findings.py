"""What a probe gives, and the table of all."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "problem"]

LINE_WIDTH = 110


@dataclass(frozen=True)
class Finding:
    """The result of one probe."""

    name: str
    value: str
    level: Level = "ok"
    """"note": works, with a limit worth knowing; "problem": something that will fail."""
    advice: str = ""
    """One sentence on what to do, or empty."""


Probe = Callable[[], list[Finding]]
"""Answers one question about the machine."""


def guarded(name: str, probe: Probe) -> list[Finding]:
    """The probe's findings; whatever it raises becomes one finding."""
    try:
        return probe()
    except Exception as error:  # A report on a broken machine must not break with it.
        return [Finding(name, f"{type(error).__name__}: {error}", "problem", "This could not be examined.")]


def render(findings: list[Finding]) -> str:
    """A table in plain ASCII, so that every console can show it; advice stands under its finding."""
    name_width = max((len(_ascii(finding.name)) for finding in findings), default=0)
    indent = " " * (len("problem") + 2 + name_width + 2)
    lines = []
    for finding in findings:
        head = f"{finding.level:<7}  {_ascii(finding.name):<{name_width}}  "
        lines += _wrap(_ascii(finding.value) or "-", head, indent)
        lines += _wrap(_ascii(finding.advice), f"{indent}-> ", f"{indent}   ")
    counts = {level: sum(finding.level == level for finding in findings) for level in ("problem", "note")}
    lines += ["", ", ".join(f"{count} {level}{'' if count == 1 else 's'}" for level, count in counts.items())]
    return "\n".join(lines)


def _ascii(text: str) -> str:
    """`text` on one line; what is not printable ASCII is escaped."""
    return "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def _wrap(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, LINE_WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
