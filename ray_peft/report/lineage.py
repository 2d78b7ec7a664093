"""Which rows were made of one model and of the same files: only those are compared."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence

from ray_peft.report.table import Row


def lineages(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """For each row what its model is, and what became of its data; rows are compared where both are equal.

    A model is known by its fingerprint. A row that has none is taken for the one model that other rows know by its
    name; where nothing is known nothing is told apart. An ensemble makes its members' models one: it is there to be
    compared with them.
    Rows with the same data settings whose prepared rows differ were made before and after a file changed.
    """
    models = _models(rows)
    keys: dict[str, set[str]] = {}
    for row in rows:
        if row.result.provenance.data_key:
            keys.setdefault(_data_settings(row), set()).add(row.result.provenance.data_key)
    changed = [len(keys.get(_data_settings(row), ())) > 1 for row in rows]
    data = [(row.result.provenance.data_key or "") if parted else "" for row, parted in zip(rows, changed, strict=True)]
    return list(zip(models, data, strict=True))


def _models(rows: Sequence[Row]) -> list[str]:
    fingerprints: dict[str, set[str]] = {}
    for row in rows:
        if row.result.provenance.model_fingerprint:
            fingerprints.setdefault(row.result.spec.model.name, set()).add(row.result.provenance.model_fingerprint)

    def of(name: str) -> str:
        only = fingerprints.get(name, set())
        return next(iter(only)) if len(only) == 1 else ""

    joined: dict[str, str] = {}

    def root(model: str) -> str:
        while model in joined:
            model = joined[model]
        return model

    models = [row.result.provenance.model_fingerprint or of(row.result.spec.model.name) for row in rows]
    for model, row in zip(models, rows, strict=True):
        for member in row.result.spec.members():
            if model and (other := root(of(member.model.name))) not in ("", root(model)):
                joined[other] = root(model)
    return [root(model) for model in models]


def _data_settings(row: Row) -> str:
    spec = row.result.spec
    parts: list[Hashable] = [json.dumps(spec.data.plain(), sort_keys=True), spec.loss_line(), spec.model.name]
    return json.dumps([*parts, spec.model.tokenizer])
