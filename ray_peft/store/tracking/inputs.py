"""What a run was trained and scored on, as MLflow shows it: the column of data sets, and scores linked to theirs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ray_peft.foundation.masking import mask
from ray_peft.spec import ImageTrialSpec, LlmTrialSpec, TrialSpec
from ray_peft.trial.result import TrialResult

Context = Literal["training", "validation", "testing"]

_DIGEST_CHARACTERS = 8
"""MLflow takes up to 36; its own digests have these."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """One data set of a run; the fields are those of MLflow's `Dataset`."""

    name: str
    digest: str
    """Of the settings that draw the rows and, where it is known, of the prepared rows."""
    source_type: Literal["local", "hugging_face"]
    source: str
    """JSON."""
    profile: str
    """JSON: rows as the settings ask for them."""
    context: Context


def data_sets(result: TrialResult) -> list[DataSet]:
    """The training, validation and held-out rows of each source, in order."""
    key = result.provenance.data_key or ""
    sets = []
    for name, path, parts, split in _sources(result.spec):
        for context, rows in parts.items():
            if rows:
                drawn = json.dumps([name, path, split, context, rows, key])
                sets.append(
                    DataSet(
                        name=name,
                        digest=hashlib.sha256(drawn.encode()).hexdigest()[:_DIGEST_CHARACTERS],
                        source_type="local" if Path(path).exists() else "hugging_face",
                        source=json.dumps({"uri": mask(path)} if Path(path).exists() else {"path": mask(path)}),
                        profile=json.dumps({"rows": rows}),
                        context=context,
                    )
                )
    return sets


def scored_on(result: TrialResult, sets: Sequence[DataSet]) -> DataSet | None:
    """The data set that the scores are of; None where they are of several together."""
    spec = result.spec
    validation = isinstance(spec, LlmTrialSpec) and spec.evaluation.split == "validation"
    scored = [data for data in sets if data.context == ("validation" if validation else "testing")]
    return scored[0] if len(scored) == 1 else None


def group_of(spec: TrialSpec) -> str:
    """The same for trials that differ in their seed alone, so that charts can be grouped by it."""
    plain = spec.plain()
    del plain["seed"]
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    return f"{spec.method.name}-{digest[:_DIGEST_CHARACTERS]}"


def _sources(spec: TrialSpec) -> list[tuple[str, str, dict[Context, int | float], str]]:
    """Name, path, rows by what they are for, and split."""
    if isinstance(spec, LlmTrialSpec):
        return [
            (source.label, part_path, parts, source.split)
            for source in spec.data.sources
            for part_path, parts in _paths(source.path, source.test_path, source.train, source.validation, source.test)
        ]
    assert isinstance(spec, ImageTrialSpec)
    data = spec.data
    return [(Path(data.path).name, data.path, {"training": data.train}, data.split)]


def _paths(
    path: str, test_path: str | None, train: int | float, validation: int | float, test: int | float
) -> list[tuple[str, dict[Context, int | float]]]:
    """The rows of each file of a source."""
    if test_path is None:
        return [(path, {"training": train, "validation": validation, "testing": test})]
    return [(path, {"training": train, "validation": validation}), (test_path, {"testing": test})]
