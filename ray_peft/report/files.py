"""A sweep's folder -> its report; reads what a killed sweep has left, too."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ray_peft.errors import DataError
from ray_peft.foundation.json_lines import problem, read_lines
from ray_peft.foundation.names import PathPart
from ray_peft.foundation.strict import Strict
from ray_peft.foundation.whole import write_text
from ray_peft.metrics.scores import ImageFile, QuestionScores, RowLoss, RowReward, Sample
from ray_peft.report.content import build
from ray_peft.report.csvfile import write_csv
from ray_peft.report.curves import read_curve
from ray_peft.report.document import Figure
from ray_peft.report.markdown import to_markdown
from ray_peft.report.material import Material
from ray_peft.report.rescore import rescored
from ray_peft.report.webpage import to_html
from ray_peft.space.read import ReportSpec
from ray_peft.store.results_file import read_results

REPORT = "report.md"
"""The report as text, in a sweep's folder and among the artifacts of its run."""


class Sweep(Strict):
    """The content of `sweep.json`; keys that the report does not use are ignored."""

    model_config = ConfigDict(extra="ignore")

    name: str | None = None
    """The title; None takes the folder's name."""
    description: str = ""
    notes: tuple[str, ...] = ()
    """What to know about the data, such as counts of rows."""
    planned: tuple[PathPart, ...] = ()
    """Ids of the trials that the sweep was to run."""
    report: ReportSpec = ReportSpec()


class Answer(Strict):
    """A line of `answers.jsonl`: one held-out row with what the trial generated."""

    model_config = ConfigDict(extra="ignore")

    row: int
    prediction: str
    reference: str
    prompt: str | None = None
    """None in files of versions up to 0.2.0."""
    ended: bool | None = None
    """Whether the answer ended by itself; None in files of versions up to 0.2.0."""


def write_report(folder: Path, *, loss_steps: Sequence[int] | None = None) -> list[Path]:
    """Write report.md, report.html, report.csv and plots/*.svg from what the folder of a sweep holds.

    Args:
        folder: of the sweep.
        loss_steps: the steps of the table of losses; None takes those of the search space, or some over the run.

    Returns:
        The paths written, in this order.

    Raises:
        DataError: the folder holds no sweep, or a file in it is malformed.
    """
    folder = Path(folder)
    material = read_material(folder, loss_steps)
    document = build(material)
    markdown, page, table = (folder / name for name in (REPORT, "report.html", "report.csv"))
    plots = _write_plots(document.figures, folder / "plots")
    write_text(markdown, to_markdown(document))
    write_text(page, to_html(document))
    write_csv(material.results, table)
    return [markdown, page, table, *plots]


def read_material(folder: Path, loss_steps: Sequence[int] | None = None) -> Material:
    """The results and files of a sweep's folder.

    Raises:
        DataError: the folder holds no sweep, or a file in it is malformed.
    """
    sweep = _read_sweep(folder)
    # A sweep that was stopped before its first trial ended has a plan and no results.
    results = [] if sweep is not None and not (folder / "results.jsonl").exists() else read_results(folder)
    sweep = sweep or Sweep()
    if sweep.planned:  # rows of trials that the search space no longer names stay in results.jsonl alone
        results = [result for result in results if result.trial_id in sweep.planned]
    trials = {result.trial_id: folder / "trials" / result.trial_id for result in results}
    lines_of = {
        trial_id: _ordered(lines)
        for trial_id, path in trials.items()
        if (lines := read_lines(path / "answers.jsonl", Answer))
    }
    answers = {
        trial_id: ([line.prediction for line in lines], [line.reference for line in lines])
        for trial_id, lines in lines_of.items()
    }
    results = rescored(results, answers)
    samples = {trial_id: read_lines(path / "samples.jsonl", Sample) for trial_id, path in trials.items()}
    losses = {
        trial_id: sorted(row_losses, key=lambda entry: entry.row)
        for trial_id, path in trials.items()
        if (row_losses := read_lines(path / "losses.jsonl", RowLoss))
    }
    return Material(
        title=sweep.name or folder.absolute().name,
        description=sweep.description,
        notes=sweep.notes,
        planned=sweep.planned,
        results=results,
        samples=samples,
        answers=answers,
        ended={trial_id: [line.ended for line in lines] for trial_id, lines in lines_of.items()},
        prompts=_prompts(lines_of, samples),
        losses={trial_id: [entry.loss for entry in lines] for trial_id, lines in losses.items()},
        loss_tokens={
            trial_id: [entry.tokens for entry in lines if entry.tokens is not None]
            for trial_id, lines in losses.items()
            if all(entry.tokens is not None for entry in lines)
        },
        rewards={trial_id: read_lines(path / "rewards.jsonl", RowReward) for trial_id, path in trials.items()},
        questions={
            trial_id: read_lines(path / "benchmarks.jsonl", QuestionScores) for trial_id, path in trials.items()
        },
        images={
            trial_id: image_files
            for trial_id, path in trials.items()
            if (image_files := _read_images(path / "images/images.json"))
        },
        folder=folder,
        curves={trial_id: read_curve(path / "metrics.jsonl") for trial_id, path in trials.items()},
        loss_steps=sweep.report.loss_steps if loss_steps is None else loss_steps,
    )


def _write_plots(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Write the plots; plots of an earlier report that this one lacks are removed."""
    paths = [folder / f"{figure.name}.svg" for figure in figures]
    if paths:
        folder.mkdir(exist_ok=True)
    for path, figure in zip(paths, figures, strict=True):
        write_text(path, figure.svg)
    for old in set(folder.glob("*.svg")) - set(paths):
        old.unlink()
    return paths


def _read_sweep(folder: Path) -> Sweep | None:
    path = folder / "sweep.json"
    try:
        return Sweep.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DataError(f"{path}: {problem(error)}") from None


def _ordered(answers: list[Answer]) -> list[Answer]:
    """The answers in the order of rows; of a row given twice the later one."""
    by_row = {answer.row: answer for answer in answers}
    return [by_row[row] for row in sorted(by_row)]


def _prompts(answers: Mapping[str, Sequence[Answer]], samples: Mapping[str, Sequence[Sample]]) -> dict[int, str]:
    """The prompt of each held-out row that any trial kept; trials that answered other rows leave those out."""
    prompts: dict[int, set[str]] = {}
    for line in (line for lines in answers.values() for line in lines):
        if line.prompt is not None:
            prompts.setdefault(line.row, set()).add(line.prompt)
    for sample in (sample for several in samples.values() for sample in several):
        prompts.setdefault(sample.row, set()).add(sample.prompt)
    return {row: next(iter(texts)) for row, texts in prompts.items() if len(texts) == 1}


def _read_images(path: Path) -> list[ImageFile]:
    """The list of a trial's made images; none if there is no file."""
    if not path.exists():
        return []
    try:
        return TypeAdapter(list[ImageFile]).validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path}: {problem(error)}") from None
