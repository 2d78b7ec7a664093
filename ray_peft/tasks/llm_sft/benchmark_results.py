"""The results of lm-eval as scores by "task/metric", and what each question adds to them."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, SupportsFloat

from ray_peft.metrics.scores import QuestionScores

logger = logging.getLogger(__name__)


def collect(
    results: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """Values, standard errors and questions by "task/metric", from lm-eval's `results`.

    lm-eval's keys are "metric,filter" and "metric_stderr,filter"; the filter is named where a metric has several.
    What is no finite number is left out.
    """
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    rows: dict[str, int] = {}
    for task, entry in results.items():
        for (metric, chosen), key in _keys(task, entry).items():
            value, error = _number(entry[f"{metric},{chosen}"]), _number(entry.get(f"{metric}_stderr,{chosen}"))
            if value is None:
                raw = entry[f"{metric},{chosen}"]
                logger.warning("evaluation.benchmarks: %s is %r, no finite number: left out", key, raw)
                continue
            values[key] = value
            if error is not None:
                errors[key] = error
            counts = entry.get("sample_count", {})  # of a group, whose tasks need not all have the metric
            count = counts.get(f"{metric},{chosen}", entry.get("sample_len"))
            if count is not None:
                rows[key] = int(count)
    return values, errors, rows


def by_question(
    results: Mapping[str, Mapping[str, Any]],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    groups: Mapping[str, Sequence[str]],
) -> list[QuestionScores]:
    """The scores of each question, in the order of tasks and questions.

    Args:
        results: lm-eval's.
        samples: lm-eval's log of each task: an entry for every question and filter.
        groups: the members of each group, tasks and groups.
    """
    owners: dict[str, list[str]] = {}
    for group in groups:
        for task in dict.fromkeys(_tasks(group, groups)):
            owners.setdefault(task, []).append(group)
    questions: list[QuestionScores] = []
    for task, logged in samples.items():
        keys = [_keys(name, results.get(name, {})) for name in (task, *owners.get(task, ()))]
        values: dict[tuple[int, str], dict[str, float]] = {}
        for sample in logged:
            scores = values.setdefault((int(sample["doc_id"]), _hash(sample)), {})
            for metric in sample["metrics"]:
                if (value := _number(sample[metric])) is not None:
                    named = (metric, sample["filter"])
                    scores.update({of[named]: value for of in keys if named in of})
        questions += [
            QuestionScores(task=task, question=at, hash=key, values=scores) for (at, key), scores in values.items()
        ]
    return questions


def _keys(task: str, entry: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """The key of each metric and filter in `results`, by both."""
    measured = [key.partition(",")[::2] for key in entry if "," in key]
    metrics = [(metric, chosen) for metric, chosen in measured if not metric.endswith("_stderr")]
    names = [metric for metric, _ in metrics]
    return {
        (metric, chosen): f"{task}/{metric}" if names.count(metric) == 1 else f"{task}/{metric}/{chosen}"
        for metric, chosen in metrics
    }


def _tasks(group: str, groups: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The tasks in a group and in the groups inside it."""
    for member in groups[group]:
        if member in groups:
            yield from _tasks(member, groups)
        else:
            yield member


def _hash(sample: Mapping[str, Any]) -> str:
    parts = (str(sample[part]) for part in ("doc_hash", "prompt_hash", "target_hash"))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]


def _number(value: Any) -> float | None:
    """None for what is no finite number, such as the "N/A" of a missing standard error."""
    try:
        number = float(value) if isinstance(value, SupportsFloat) else math.nan
    except (TypeError, ValueError):  # an array of several numbers
        return None
    return number if math.isfinite(number) else None
