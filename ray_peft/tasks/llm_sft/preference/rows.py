"""Prepared rows with a judgement: their sides, and a pair as two labelled rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.encode import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

_ROUNDED = 0.01
"""Of a share of weights, what rounded weights may miss."""

_SIDES = (("input_ids", "labels"), ("rejected_ids", "rejected_labels"))


def are_judged(rows: Dataset) -> bool:
    """Whether rows are pairs or labelled."""
    return "rejected_ids" in rows.column_names or "desirable" in rows.column_names


def side_columns(rows: Dataset) -> list[tuple[str, str]]:
    """The columns with token ids and labels of each side."""
    return [columns for columns in _SIDES if columns[0] in rows.column_names]


def side(rows: Dataset, columns: tuple[str, str], *others: str) -> Dataset:
    """A side, whose columns become input_ids and labels, with others as they are."""
    selected: Dataset = rows.select_columns([*columns, *others])
    return selected.rename_columns(dict(zip(columns, _SIDES[0], strict=True)))


def trained_rows(spec: LlmTrialSpec, rows: Dataset) -> Dataset:
    """The training rows in the form that the objective takes: for kto a pair is a desirable row and another one."""
    if spec.train.objective != "kto" or "rejected_ids" not in rows.column_names:
        return rows
    from datasets import concatenate_datasets

    parts = []
    for columns, desirable in zip(_SIDES, (True, False), strict=True):
        parts.append(side(rows, columns, "source_dataset", "row").add_column("desirable", [desirable] * len(rows)))
    return concatenate_datasets([parts[0], parts[1].cast(parts[0].features)])


def mismatched(row: Mapping[str, Any], before: Mapping[str, Any], limit: int) -> tuple[list[int], list[int]]:
    """Token ids and labels of a row's prompt with the answer of the row before it, cut at `limit` tokens.

    From such pairs KTO estimates how far the model has gone from what it was: their answers are as likely as those of
    the rows, and belong to other prompts. As in TRL's KTOTrainer an answer moves on by one row, here of all rows. The
    limit is that of `longest_row`, so that these pairs take no more memory or positions than the rows themselves.
    """
    ids = row["input_ids"][: _answer_begins(row["labels"])]
    begin = _answer_begins(before["labels"])
    answer, labels = before["input_ids"][begin:], before["labels"][begin:]
    return [*ids, *answer][:limit], [*[IGNORED] * len(ids), *labels][:limit]


def longest_row(rows: Dataset) -> int:
    """Tokens of the longest row."""
    return max(map(len, rows["input_ids"]))


def mismatched_rows(rows: Dataset) -> Dataset:
    """`mismatched` of every row, with the columns input_ids and labels."""
    from datasets import Dataset

    columns = {name: list(rows[name]) for name in ("input_ids", "labels")}
    listed = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    limit = longest_row(rows)
    sides = [mismatched(row, listed[place - 1], limit) for place, row in enumerate(listed)]
    return Dataset.from_dict({"input_ids": [ids for ids, _ in sides], "labels": [labels for _, labels in sides]})


def _answer_begins(labels: list[int]) -> int:
    return next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))


def cautions(spec: LlmTrialSpec, rows: Dataset) -> list[str]:
    """What to know of the balance of kto's training rows; nothing of other objectives."""
    if spec.train.objective != "kto":
        return []
    settings = spec.train.preference
    desirable = sum(rows["desirable"])
    undesirable = len(rows) - desirable
    if not desirable or not undesirable:
        kind = "desirable" if desirable else "undesirable"
        return [f"kto: all {len(rows)} training rows are {kind}, so that nothing holds the model back; add others"]
    share = settings.desirable_weight * desirable / (settings.undesirable_weight * undesirable)
    if 1 - _ROUNDED <= share <= 4 / 3 + _ROUNDED:
        return []
    low, high = (factor * settings.undesirable_weight * undesirable / desirable for factor in (1, 4 / 3))
    return [
        f"kto: {desirable} desirable training rows of weight {settings.desirable_weight:g} and {undesirable} "
        f"undesirable ones of weight {settings.undesirable_weight:g}: the first weigh {share:.2f} times as much in "
        f"all, where the paper asks for 1 to 1.33; set train.preference.desirable_weight to {low:.2f} to {high:.2f}"
    ]


def desirable_rows(rows: Dataset) -> Dataset:
    """Those whose answers are good, as which all count that are not labelled."""
    if "desirable" not in rows.column_names:
        return rows
    return rows.select([place for place, desirable in enumerate(rows["desirable"]) if desirable])
