"""What each question of lm-eval's tasks adds to a score, of the scores that are means over questions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import TypeAlias

from ray_peft.metrics.intervals import Numbers, mean_parts
from ray_peft.metrics.scores import QuestionScores
from ray_peft.trial.result import TrialResult

CLOSE = 1e-9
"""How near, as a share, the mean over questions must come to the score that lm-eval gives."""
NO_FILE = "no values by question on file"
NO_MEAN = "no mean over questions"
OTHERS = "other questions"

Question: TypeAlias = tuple[str, int, str]
"""Task, index in it, and hash."""


@dataclass(frozen=True, eq=False)
class Parts:
    """A score, question by question."""

    questions: tuple[Question, ...]
    """In a fixed order."""
    values: Numbers
    """(question,): what each adds; their mean is the score."""


class Questions:
    """What the trials' questions were given, put together by score, computed once a trial."""

    def __init__(self, questions: Mapping[str, Sequence[QuestionScores]] | None = None) -> None:
        """Take the lines of `benchmarks.jsonl` by trial id; rows of earlier versions have none."""
        self._questions = {trial_id: lines for trial_id, lines in (questions or {}).items() if lines}
        self._by_score = cache(self._sorted)
        self._parts: dict[tuple[str, str], Parts | str] = {}

    def parts(self, result: TrialResult, key: str) -> Parts | str:
        """The score `key` of a trial by question, or else why it has none: `NO_FILE` or `NO_MEAN`.

        A score of a group is the mean over its questions, or of its tasks' means.
        """
        place = (result.trial_id, key)
        if place not in self._parts:
            self._parts[place] = self._read(result, key)
        return self._parts[place]

    def _read(self, result: TrialResult, key: str) -> Parts | str:
        if result.trial_id not in self._questions:
            return NO_FILE
        values = self._by_score(result.trial_id).get(key)
        if not values or not all(math.isfinite(value) for value in values.values()):
            return NO_MEAN
        order = tuple(sorted(values))
        sizes = Counter(task for task, _, _ in order)
        numbers, alike = [values[question] for question in order], [1 / sizes[task] for task, _, _ in order]
        for weights in (None, alike):
            parts = mean_parts(numbers, weights)
            if math.isclose(fmean(parts), result.scores.benchmarks[key], rel_tol=CLOSE, abs_tol=CLOSE):
                return Parts(order, parts)
        return NO_MEAN

    def _sorted(self, trial_id: str) -> dict[str, dict[Question, float]]:
        """By score; of a question given twice the later one."""
        by_score: dict[str, dict[Question, float]] = {}
        for line in self._questions[trial_id]:
            for key, value in line.values.items():
                by_score.setdefault(key, {})[line.task, line.question, line.hash] = value
        return by_score
