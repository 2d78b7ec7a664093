"""A table with a line per row, from what each column reads."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from ray_peft.report.digits import MISSING
from ray_peft.report.document import Block, Table
from ray_peft.report.table import Row

Read: TypeAlias = Callable[[Row], str]
"""The text of a row's cell; "-" if there is nothing."""

Column: TypeAlias = tuple[str, Read]


def row_table(rows: Sequence[Row], columns: Sequence[Column], *, text_columns: int = 1) -> list[Block]:
    """The table; columns that no row fills are left out, and without rows there is none."""
    if not rows:
        return []
    filled = [(name, cells) for name, read in columns if set(cells := [read(row) for row in rows]) != {MISSING}]
    lines = [(row.label, *(cells[index] for _, cells in filled)) for index, row in enumerate(rows)]
    return [Table(header=("Trial", *(name for name, _ in filled)), lines=tuple(lines), text_columns=text_columns)]
