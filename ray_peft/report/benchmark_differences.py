"""Whether two trials' scores on tasks of lm-eval differ: question by question if that can be, else by their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from ray_peft.metrics.intervals import CONFIDENCE, DifferenceInterval, Numbers, corrected, pair_differences
from ray_peft.report.digits import fixed
from ray_peft.report.questions import OTHERS, Parts, Questions
from ray_peft.report.ties import FEWEST_ROWS
from ray_peft.spec import BenchmarksSpec, LlmTrialSpec
from ray_peft.trial.result import TrialResult

STANDARD_ERRORS = 2
"""A difference of independent samples within this many standard errors counts as tied."""
FEWEST_QUESTIONS = 30
"""With fewer questions a standard error is itself too uncertain to show a difference."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """One score of two systems, each the mean over its trials (seeds)."""

    key: str
    first: tuple[TrialResult, ...]
    second: tuple[TrialResult, ...]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first system's score less the second's."""

    value: float
    questions: int
    """Of the system that has fewer."""
    why_not: str | None
    """Why they are taken as two independent samples; None where they are paired by question."""
    interval: DifferenceInterval | None
    """Of independent samples, two standard errors on both sides; None without standard errors."""

    @property
    def enough(self) -> bool:
        """Whether so many questions can show a difference."""
        return self.questions >= (FEWEST_ROWS if self.why_not is None else FEWEST_QUESTIONS)

    @property
    def compared_as(self) -> str:
        """How the two were compared, in words."""
        return "paired by question" if self.why_not is None else f"two independent samples: {self.why_not}"

    def text(self, tied: str) -> str:
        """The difference with what it is uncertain by; `tied` follows unless it is shown."""
        text = fixed(self.value, 4, signed=True)
        if self.interval is None:
            return f"{text}, no standard error"
        low, high = self.interval.low, self.interval.high
        if self.why_not is None:
            text += f" [{fixed(low, 4, signed=True)}, {fixed(high, 4, signed=True)}]"
        else:
            text += f" +/- {fixed((high - low) / 2 / STANDARD_ERRORS, 4)}"
        if self.enough:
            return text if self.interval.shown else f"{text}, {tied}"
        return f"{text}, too few questions" if self.interval.excludes_zero else f"{text}, {tied}"


def differences(sides: Sequence[Sides], questions: Questions) -> list[Difference | None]:
    """What is known of each comparison; p-values are corrected for all that have enough questions to show anything.

    None where the two were not asked the same questions by their settings, nor by what is on file.
    """
    paired = [_paired(two, questions) for two in sides]
    places = [place for place, results in enumerate(paired) if not isinstance(results, str)]
    tested = pair_differences([pair for pair in paired if not isinstance(pair, str)])
    intervals = dict(zip(places, tested, strict=True))
    results: list[Difference | None] = []
    for place, (two, pair) in enumerate(zip(sides, paired, strict=True)):
        if not isinstance(pair, str):
            interval = intervals[place]
            results.append(
                Difference(value=interval.difference, questions=len(pair[0]), why_not=None, interval=interval)
            )
        else:
            results.append(_independent(two, pair) if _same_questions_by_settings(two) else None)
    return _corrected(results)


def _corrected(differences: Sequence[Difference | None]) -> list[Difference | None]:
    """The differences with corrected p-values."""
    tested = {
        place: difference.interval
        for place, difference in enumerate(differences)
        if difference is not None and difference.enough and difference.interval is not None
    }
    new = dict(zip(tested, corrected(list(tested.values())), strict=True))
    return [
        difference
        if difference is None or place not in new
        else Difference(
            value=difference.value, questions=difference.questions, why_not=difference.why_not, interval=new[place]
        )
        for place, difference in enumerate(differences)
    ]


def _paired(two: Sides, questions: Questions) -> tuple[Numbers, Numbers] | str:
    """What each question adds to both systems' scores, or else why they cannot stand beside each other."""
    parts: list[Parts] = []
    for trial in (*two.first, *two.second):
        trial_parts = questions.parts(trial, two.key)
        if isinstance(trial_parts, str):
            return trial_parts
        parts.append(trial_parts)
    if len({trial_parts.questions for trial_parts in parts}) > 1:
        return OTHERS
    return _mean(parts[: len(two.first)]), _mean(parts[len(two.first) :])


def _mean(parts: Sequence[Parts]) -> Numbers:
    mean: Numbers = np.mean([read.values for read in parts], axis=0)
    return mean


def _independent(two: Sides, why_not: str) -> Difference:
    """By the standard errors; that of a mean over seeds, who answer the same questions, is taken as a single seed's."""
    from scipy.special import erfc

    first, second = ([trial.scores.benchmarks[two.key] for trial in trials] for trials in (two.first, two.second))
    value = fmean(first) - fmean(second)
    questions = min(trial.scores.benchmark_rows.get(two.key, 0) for trial in (*two.first, *two.second))
    errors = [[trial.scores.benchmark_stderr.get(two.key) for trial in trials] for trials in (two.first, two.second)]
    known_errors = [[error for error in side if error is not None] for side in errors]
    if known_errors != errors:
        return Difference(value=value, questions=questions, why_not=why_not, interval=None)
    error = math.hypot(*(fmean(side) for side in known_errors))
    low, high = value - STANDARD_ERRORS * error, value + STANDARD_ERRORS * error
    p = float(erfc(abs(value) / error / math.sqrt(2))) if error else float(value == 0)
    interval = DifferenceInterval(difference=value, low=low, high=high, p=p, confidence=CONFIDENCE)
    return Difference(value=value, questions=questions, why_not=why_not, interval=interval)


def _same_questions_by_settings(two: Sides) -> bool:
    """Whether all were asked the same questions by their settings and their number."""
    specs = [benchmarks_of(trial) for trial in (*two.first, *two.second)]
    settings = {(spec.num_fewshot, spec.limit, spec.include_path) for spec in specs if spec is not None}
    counts = {trial.scores.benchmark_rows.get(two.key) for trial in (*two.first, *two.second)}
    return None not in specs and len(settings) == 1 and len(counts) == 1


def benchmarks_of(result: TrialResult) -> BenchmarksSpec | None:
    """The further benchmarks that a trial was asked to run; None if there are none."""
    spec = result.spec
    return spec.evaluation.benchmarks if isinstance(spec, LlmTrialSpec) else None
