"""Prepared rows with a judgement: their sides, and a pair as two labelled rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_peft.spec import LlmTrialSpec

if TYPE_CHECKING:
    from datasets import Dataset

_SIDES = (("input_ids", "labels"), ("rejected_ids", "rejected_labels"))


def are_judged(rows: Dataset) -> bool:
    """Whether rows are pairs or labelled."""
    return "rejected_ids" in rows.column_names or "desirable" in rows.column_names


def side_columns(rows: Dataset) -> list[tuple[str, str]]:
    """The columns with token ids and labels of each side."""
    return [columns for columns in _SIDES if columns[0] in rows.column_names]


def trained_rows(spec: LlmTrialSpec, rows: Dataset) -> Dataset:
    """The training rows in the form that the objective takes: for kto a pair is a desirable row and another one."""
    if spec.train.objective != "kto" or "rejected_ids" not in rows.column_names:
        return rows
    from datasets import concatenate_datasets

    parts = []
    for (ids, labels), desirable in zip(_SIDES, (True, False), strict=True):
        part: Dataset = rows.select_columns([ids, labels, "source_dataset", "row"])
        part = part.rename_columns({ids: "input_ids", labels: "labels"}) if ids != "input_ids" else part
        parts.append(part.add_column("desirable", [desirable] * len(rows)))
    return concatenate_datasets(parts)


def desirable_rows(rows: Dataset) -> Dataset:
    """Those whose answers are good, as which all count that are not labelled."""
    if "desirable" not in rows.column_names:
        return rows
    return rows.select([place for place, desirable in enumerate(rows["desirable"]) if desirable])
