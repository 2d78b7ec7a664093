"""Rows that cannot be used: how many for which reason, and the first of them by number."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

TEMPLATE = "the chat template"
"""How the reasons begin for which another chat template may help."""

NAMED = 5
"""Rows that are named for each reason; the others are counted."""
MOST_REASONS = 20
"""Reasons that are counted apart: some hold a word of the row, so that there may be as many as rows."""
OTHERS = "other reasons"


@dataclass
class LeftOut:
    """Unusable rows of one source, by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    """File and number of the first rows for each reason; no file where it is that of the source."""

    def add(self, reason: str, file: str, number: int) -> None:
        """Record a row."""
        reason = self._counted_reason(reason)
        self.counts[reason] += 1
        rows = self.first.setdefault(reason, [])
        if len(rows) < NAMED:
            rows.append((file, number))

    def update(self, other: LeftOut) -> None:
        """Add the rows of another file of the source."""
        for reason, rows in other.first.items():
            counted = self._counted_reason(reason)
            self.counts[counted] += other.counts[reason]
            self.first[counted] = (self.first.get(counted, []) + rows)[:NAMED]

    def _counted_reason(self, reason: str) -> str:
        return reason if reason in self.counts or len(self.counts) < MOST_REASONS else OTHERS

    def rows(self, reason: str) -> str:
        """The first rows for a reason, such as `rows 3, 10, 17, 24, 31 and 2 more`."""
        by_file: dict[str, list[int]] = {}
        for file, number in self.first[reason]:
            by_file.setdefault(file, []).append(number)
        parts = []
        for file, numbers in by_file.items():
            of = f" of {Path(file).name}" if file else ""
            parts.append(f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}{of}")
        more = self.counts[reason] - len(self.first[reason])
        return ", ".join(parts) + (f" and {more:,} more" if more else "")

    def named(self) -> dict[str, str]:
        """The first rows for each reason."""
        return {reason: self.rows(reason) for reason in self.counts}

    def summary(self) -> str:
        """All reasons, the most frequent first."""
        return ", ".join(f"{count} x {reason}: {self.rows(reason)}" for reason, count in self.counts.most_common())

    def clause(self) -> str:
        """The end of an error about too few rows; empty if every row can be used."""
        if not self.counts:
            return ""
        help_ = f"; {self.way_out()}" if self._by_template() else ""
        return f"; {self.counts.total():,} rows are unusable ({self.summary()}){help_}"

    def way_out(self) -> str:
        """What makes such rows usable."""
        if self._by_template():
            return "name a .jinja file that writes them in data.chat_template, or a tokenizer whose template does"
        return "check that the recipe suits the file"

    def _by_template(self) -> bool:
        return any(reason.startswith(TEMPLATE) for reason in self.counts)
