"""The section on further benchmarks: every score with its standard error, and which differences are shown."""

from collections.abc import Mapping, Sequence

from ray_peft.report.benchmark_differences import (
    FEWEST_QUESTIONS,
    STANDARD_ERRORS,
    Difference,
    Sides,
    benchmarks_of,
    differences,
)
from ray_peft.report.digits import MISSING, count, fixed
from ray_peft.report.document import Block, Heading, Paragraph, Table
from ray_peft.report.lineage import lineages
from ray_peft.report.paired import trial_pairs
from ray_peft.report.questions import Questions
from ray_peft.report.table import Row, SeedGroup
from ray_peft.report.ties import FEWEST_ROWS

_HEADER = ("Benchmark", "Trial", "Score", "Standard error", "Questions", "vs base", "Taken as")
_TEXT = (
    "Tasks of lm-eval. Standard errors are lm-eval's and speak of the choice of questions. In accuracies, exact_match "
    "and pass@k higher is better, in perplexities lower. vs base: the difference to the model without fine-tuning. "
    "Taken as: where both answered the same questions and the score is a mean over questions, the two are paired by "
    "question, with the 95 % interval of the difference in brackets; a difference is shown if a permutation test of "
    "signs rejects equality and the interval leaves out zero. Else they are taken as two independent samples, which on "
    "the same questions makes the standard error (after +/-) rather too large than too small; a difference is shown "
    'beyond {errors} standard errors. "Tied": not shown. All tests of a table are corrected for their number (Holm). '
    "With fewer than {rows} paired questions, or {questions} of independent samples, no difference is shown."
)
_PAIRS = "Score of the first less that of the second, on the same model; of several seeds the mean, seed by seed."


def further(
    compared: Sequence[Row], questions: Questions | None = None, units: Sequence[SeedGroup] = ()
) -> list[Block]:
    """The tasks that the trials name; tasks below them, such as the subjects of MMLU, are in a folded table.

    Args:
        compared: the rows.
        questions: the scores of single questions, for rows that have them.
        units: the rows over seeds, for differences between them.
    """
    scored = [row for row in compared if row.result.scores.benchmarks]
    keys = list(dict.fromkeys(key for row in scored for key in row.result.scores.benchmarks))
    if not keys:
        return []
    questions = questions or Questions()
    requested = {task for row in scored for task in _tasks(row)}
    named = [key for key in keys if key.partition("/")[0] in requested]
    # A tag, or a group without a score of its own, has no line: its tasks stand for it.
    first = named if requested <= {key.partition("/")[0] for key in named} else keys
    text = _TEXT.format(errors=STANDARD_ERRORS, questions=FEWEST_QUESTIONS, rows=FEWEST_ROWS)
    blocks: list[Block] = [_table(scored, first, questions), Paragraph(text), *_between(units, first, questions)]
    others = [key for key in keys if key not in first]
    return [*blocks, Heading("Tasks below them"), _table(scored, others, questions, folded=True)] if others else blocks


def _tasks(row: Row) -> tuple[str, ...]:
    benchmarks = benchmarks_of(row.result)
    return benchmarks.tasks if benchmarks is not None else ()


def _table(scored: Sequence[Row], keys: Sequence[str], questions: Questions, *, folded: bool = False) -> Table:
    cells = [(key, row) for key in keys for row in scored if key in row.result.scores.benchmarks]
    to_base = _against_base(cells, questions)
    lines = tuple(
        (
            key,
            row.label,
            fixed(row.result.scores.benchmarks[key], 4),
            fixed(row.result.scores.benchmark_stderr.get(key), 4),
            count(row.result.scores.benchmark_rows.get(key)),
            *_cells(to_base.get((key, row.trial_id)), "tied with base"),
        )
        for key, row in cells
    )
    return Table(header=_HEADER, lines=lines, text_columns=2, folded=folded)


def _against_base(
    cells: Sequence[tuple[str, Row]], questions: Questions
) -> Mapping[tuple[str, str], Difference | None]:
    """By score and trial the difference to the base, of those that have one."""
    sides = {
        (key, row.trial_id): Sides(key=key, first=(row.result,), second=(row.base,))
        for key, row in cells
        if row.base is not None and key in row.base.scores.benchmarks
    }
    return dict(zip(sides, differences(list(sides.values()), questions), strict=True))


def _cells(difference: Difference | None, tied: str) -> tuple[str, str]:
    return (MISSING, MISSING) if difference is None else (difference.text(tied), difference.compared_as)


def _between(units: Sequence[SeedGroup], keys: Sequence[str], questions: Questions) -> list[Block]:
    """Every pair of fine-tuned units of one model, in the scores that the trials name."""
    tuned = [
        unit
        for unit in units
        if unit.finished and not unit.is_base and not unit.finished[0].result.spec.model.random_weights
    ]
    unit_lineages = lineages([unit.finished[0] for unit in tuned])
    sides: dict[tuple[str, str, str], Sides] = {}
    for key in keys:
        for lineage in dict.fromkeys(unit_lineages):
            members = [
                unit
                for unit, unit_lineage in zip(tuned, unit_lineages, strict=True)
                if unit_lineage == lineage and _scored(unit, key)
            ]
            trials = {row.trial_id: row.result for unit in members for row in _scored(unit, key)}
            by_seed = [{row.result.spec.seed: row.trial_id for row in _scored(unit, key)} for unit in members]
            for (a, b), (first, second) in trial_pairs(members, by_seed).items():
                sides[key, members[a].label, members[b].label] = Sides(
                    key=key,
                    first=tuple(trials[trial] for trial in first),
                    second=tuple(trials[trial] for trial in second),
                )
    results = differences(list(sides.values()), questions)
    lines = tuple(
        (*names, *_cells(difference, "tied"))
        for names, difference in zip(sides, results, strict=True)
        if difference is not None
    )
    if not lines:
        return []
    header = ("Benchmark", "First", "Second", "First less second", "Taken as")
    table = Table(header=header, lines=lines, text_columns=3, folded=True)
    return [Heading("Between fine-tuned trials"), Paragraph(_PAIRS), table]


def _scored(unit: SeedGroup, key: str) -> list[Row]:
    return [row for row in unit.finished if key in row.result.scores.benchmarks]
