"""What became of the rows of a search space: a table, JSON and files to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ray_peft.errors import DataError, RayPeftError
from ray_peft.foundation.whole import write_text
from ray_peft.report.digits import count
from ray_peft.report.plain import aligned_line, ascii_line
from ray_peft.space.read import load
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.tasks.base import DataReport, SplitReport

_HEADER = ("source", "split", "rows", "cut", "left out", "overlap", "tokens", "mean", "max", "trained on")


@dataclass(frozen=True)
class SpaceData:
    """The data of those trials of a search space that share it."""

    trial: TrialSpec
    """One of them."""
    trials: int
    report: DataReport


def report_data(space: str | Path, overrides: Sequence[str] = (), profile: str | None = None) -> list[SpaceData]:
    """Prepare every distinct combination of data and tokenizer in a search space.

    Raises:
        RayPeftError: a wrong search space, or missing or malformed data or tokenizer.
    """
    groups: dict[str, list[TrialSpec]] = {}
    for trial in load(space, list(overrides), profile).trials:
        model = trial.model.plain()
        tokenizer = [model["tokenizer"] or model["name"], model["revision"]]
        key = json.dumps([trial.task, tokenizer, trial.data.plain(), trial.loss_line()], sort_keys=True)
        groups.setdefault(key, []).append(trial)
    return [SpaceData(group[0], len(group), _fitted(group)) for group in groups.values()]


def _fitted(trials: Sequence[TrialSpec]) -> DataReport:
    """The report of trials with the same rows, with what is to be said of how these fit the models."""
    task = TASKS[trials[0].task]
    report = task.data_report(trials[0])
    if report.error is not None:
        return report
    cautions: dict[str, None] = {}
    errors: dict[str, None] = {}
    distinct = {json.dumps([trial.model.plain(), trial.evaluation.plain()]): trial for trial in trials}
    for trial in distinct.values():
        try:
            cautions |= dict.fromkeys(f"caution: {text}" for text in task.rows_fit(trial))
        except RayPeftError as error:
            errors[str(error)] = None
    return replace(report, remarks=[*report.remarks, *cautions], error="\n".join(errors) or None)


def raise_if_refused(reports: Sequence[SpaceData]) -> None:
    """Raise the refusals that the reports hold.

    Raises:
        DataError: training rows repeat held-out rows, or rows do not fit a model.
    """
    errors = list(dict.fromkeys(data.report.error for data in reports if data.report.error is not None))
    if errors:
        raise DataError("\n".join(errors))


def plain(reports: Sequence[SpaceData]) -> list[dict[str, Any]]:
    """The reports as JSON-like data."""
    return [{"trials": data.trials, **asdict(data.report)} for data in reports]


def table(reports: Sequence[SpaceData]) -> str:
    """The reports as lines of printable ASCII."""
    return "\n\n".join(_one_table(data) for data in reports)


def write(reports: Sequence[SpaceData], folder: Path) -> list[Path]:
    """Write data.json and what each task has to show; several data sets go into a folder each, named by their key.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = [folder / "data.json"]
        write_text(written[0], json.dumps(plain(reports), indent=2, ensure_ascii=False) + "\n")
        for data in reports:
            if data.report.key is not None:
                target = folder if len(reports) == 1 else folder / data.report.key
                target.mkdir(exist_ok=True)
                written += TASKS[data.trial.task].write_data(data.trial, target)
    except OSError as error:
        raise DataError(f"--out {folder}: cannot be written: {error.strerror or error}") from None
    return written


def _one_table(data: SpaceData) -> str:
    report = data.report
    settings = ", ".join(f"{key} {value}" for key, value in report.settings.items())
    lines = [f"data {report.key or '(refused)'}, {data.trials} trials: {settings}", ""]
    cells = [_HEADER, *(_cells(split) for split in report.splits)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(_HEADER))]
    cells.insert(1, tuple("-" * width for width in widths))
    lines += [*(aligned_line(line, widths) for line in cells), ""]
    for source, rows in report.read.items():
        lines.append(f"{source}: {rows:,} rows read{_unusable(report, source)}")
    lines += [f"rows: {line}" for line in report.remarks]
    lines += [f"overlap: {line}" for line in report.overlap_lines]
    return "\n".join(ascii_line(line) for line in lines)


def _unusable(report: DataReport, source: str) -> str:
    """Rows left out, by reason, with the first of them where they have numbers."""
    first = report.unusable_rows.get(source, {})
    return "".join(
        f"; {rows:,} unusable ({why})" + (f": {first[why]}" if why in first else "")
        for why, rows in sorted(report.unusable[source].items())
    )


def _cells(split: SplitReport) -> tuple[str, ...]:
    mean = None if split.tokens is None or not split.rows else round(split.tokens / split.rows)
    replaced = (count(split.dropped), count(split.overlapping)) if split.split == "train" else ("-", "-")
    tokens = (count(split.tokens), count(mean), count(split.longest), count(split.trained_tokens))
    return ascii_line(split.source), split.split, count(split.rows), count(split.cut), *replaced, *tokens
