"""The section on further benchmarks: every score with its standard error, and whether it differs from the base."""

import math
from collections.abc import Sequence

from ray_peft.report.digits import MISSING, count, fixed
from ray_peft.report.document import Block, Heading, Paragraph, Table
from ray_peft.report.table import Row
from ray_peft.result import TrialResult
from ray_peft.spec import BenchmarksSpec, LlmTrialSpec

STANDARD_ERRORS = 2
"""A difference to the base within this many standard errors counts as tied."""
FEWEST_QUESTIONS = 30
"""With fewer questions a standard error is itself too uncertain to show a difference."""
_HEADER = ("Benchmark", "Trial", "Score", "Standard error", "Questions", "vs base")
_TEXT = (
    "Tasks of lm-eval. Standard errors are lm-eval's and speak of the choice of questions. In accuracies, exact_match "
    "and pass@k higher is better, in perplexities lower. vs base: the difference to the model without fine-tuning on "
    "the same questions +/- its standard error, taken as that of two independent samples, which on the same questions "
    'is rather too large than too small. "Tied with base": the difference is within {errors} standard errors. With '
    "fewer than {questions} questions no difference is shown."
)


def further(compared: Sequence[Row]) -> list[Block]:
    """The tasks that were asked for; all that lm-eval scored below them, such as the subjects of MMLU, folded."""
    scored = [row for row in compared if row.result.scores.benchmarks]
    keys = list(dict.fromkeys(key for row in scored for key in row.result.scores.benchmarks))
    if not keys:
        return []
    asked = {task for row in scored for task in _tasks(row)}
    named = [key for key in keys if key.partition("/")[0] in asked]
    # A tag, or a group without a score of its own, has no line: its tasks stand for it.
    first = named if asked <= {key.partition("/")[0] for key in named} else keys
    text = _TEXT.format(errors=STANDARD_ERRORS, questions=FEWEST_QUESTIONS)
    blocks: list[Block] = [_table(scored, first), Paragraph(text)]
    rest = [key for key in keys if key not in first]
    return [*blocks, Heading("Tasks below them"), _table(scored, rest, folded=True)] if rest else blocks


def _tasks(row: Row) -> tuple[str, ...]:
    benchmarks = _asked(row.result)
    return benchmarks.tasks if benchmarks is not None else ()


def _asked(result: TrialResult) -> BenchmarksSpec | None:
    spec = result.spec
    return spec.evaluation.benchmarks if isinstance(spec, LlmTrialSpec) else None


def _table(scored: Sequence[Row], keys: Sequence[str], *, folded: bool = False) -> Table:
    lines = tuple(
        (
            key,
            row.label,
            fixed(row.result.scores.benchmarks[key], 4),
            fixed(row.result.scores.benchmark_stderr.get(key), 4),
            count(row.result.scores.benchmark_rows.get(key)),
            _against_base(row, key),
        )
        for key in keys
        for row in scored
        if key in row.result.scores.benchmarks
    )
    return Table(header=_HEADER, lines=lines, text_columns=2, folded=folded)


def _against_base(row: Row, key: str) -> str:
    """The difference, what it is uncertain by, and "tied" unless it is shown."""
    if row.base is None or not _same_questions(row, key):
        return MISSING
    own, base = row.result.scores, row.base.scores
    difference = own.benchmarks[key] - base.benchmarks[key]
    text = fixed(difference, 4, signed=True)
    if key not in own.benchmark_stderr or key not in base.benchmark_stderr:
        return f"{text}, no standard error"
    error = math.hypot(own.benchmark_stderr[key], base.benchmark_stderr[key])
    text += f" +/- {fixed(error, 4)}"
    if abs(difference) <= STANDARD_ERRORS * error:
        return f"{text}, tied with base"
    return text if own.benchmark_rows.get(key, 0) >= FEWEST_QUESTIONS else f"{text}, too few questions"


def _same_questions(row: Row, key: str) -> bool:
    assert row.base is not None
    own, base = _asked(row.result), _asked(row.base)
    return (
        own is not None
        and base is not None
        and key in row.base.scores.benchmarks
        and (own.num_fewshot, own.limit, own.include_path) == (base.num_fewshot, base.limit, base.include_path)
        and row.result.scores.benchmark_rows.get(key) == row.base.scores.benchmark_rows.get(key)
    )
