"""report.csv: one line per trial, one column per leaf of its result."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray_peft.foundation.whole import write_text
from ray_peft.report.flat import flatten
from ray_peft.report.table import rows
from ray_peft.trial.result import TrialResult

_FIRST = ("trial_id", "label", "status")
_STARTS_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_csv(results: Sequence[TrialResult], path: Path) -> None:
    """Write every setting, score and cost of every trial, in UTF-8; a column is named by its path in results.jsonl.

    Empty means None or that the trial has no such setting; lists are JSON. Text that a spreadsheet would take for a
    formula begins with an apostrophe.
    """
    lines = [
        {"trial_id": row.trial_id, "label": row.label, "status": row.status, **flatten(row.result.row())}
        for row in rows(results)
    ]
    columns = dict.fromkeys([*_FIRST, *(key for line in lines for key in line if not _late(key))])
    columns |= dict.fromkeys(key for line in lines for key in line)
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(_cell(column) for column in columns)
    writer.writerows([_cell(line.get(column)) for column in columns] for line in lines)
    write_text(Path(path), buffer.getvalue())


def _late(key: str) -> bool:
    """Whether the column stands behind the scores and costs."""
    return key.startswith(("spec.", "provenance."))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        return json.dumps(value)
    return f"'{value}" if value.startswith(_STARTS_FORMULA) else value
