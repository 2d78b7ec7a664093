"""All that a report is made of, with what is computed from it once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ray_peft.metrics.intervals import DifferenceInterval
from ray_peft.metrics.scores import ImageFile, QuestionScores, Sample
from ray_peft.report.curves import Curve
from ray_peft.report.questions import Questions
from ray_peft.report.table import Row, SeedGroup, best_first, rows, units
from ray_peft.report.ties import Family, families
from ray_peft.report.uncertainty import (
    Answers,
    Intervals,
    Losses,
    LossTokens,
    Rewards,
    Statistics,
    intervals,
    loss_intervals,
)
from ray_peft.trial.result import TrialResult

MOST_SHOWN = 12
"""Units that a plot can tell apart."""
MOST_ROWS = 24
"""Trials of which every one is compared with the base."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """A sweep's results and what its trials left in their folders."""

    title: str
    results: Sequence[TrialResult]
    description: str = ""
    """What the sweep asks."""
    notes: Sequence[str] = ()
    """What to know about the data, such as counts of rows, one entry each."""
    planned: Sequence[str] = ()
    """Ids of the trials that the sweep was to run."""
    samples: Mapping[str, Sequence[Sample]] = field(default_factory=dict)
    """By trial id, some held-out prompts with the trial's answers."""
    answers: Answers = field(default_factory=dict)
    """By trial id, predictions and references of every generated row."""
    ended: Mapping[str, Sequence[bool | None]] = field(default_factory=dict)
    """By trial id, whether each answer ended by itself; None where that was not noted."""
    prompts: Mapping[int, str] = field(default_factory=dict)
    """By held-out row its prompt, of the rows whose prompt a trial kept."""
    losses: Losses = field(default_factory=dict)
    """By trial id, the loss of every held-out row."""
    loss_tokens: LossTokens = field(default_factory=dict)
    """By trial id, the answer tokens behind each of them; none where all rows weigh the same."""
    rewards: Rewards = field(default_factory=dict)
    """By trial id, what each judged held-out row says of the rewards."""
    questions: Mapping[str, Sequence[QuestionScores]] = field(default_factory=dict)
    """By trial id, what each question of the further benchmarks was given."""
    images: Mapping[str, Sequence[ImageFile]] = field(default_factory=dict)
    """By trial id, the images that the trial made."""
    folder: Path | None = None
    """The sweep's folder, below which the images are; None if only their names are known."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """By trial id, the losses over steps."""
    loss_steps: Sequence[int] = ()
    """Steps of the table of losses; empty takes some that are spread over the run."""

    @cached_property
    def rows(self) -> list[Row]:
        """One a trial, the best first."""
        return best_first(rows(self.results))

    @cached_property
    def units(self) -> list[SeedGroup]:
        """The rows over seeds, the best first."""
        return units(self.rows)

    @cached_property
    def main_units(self) -> list[SeedGroup]:
        """What plots and answers show: all units of a small sweep, of a large one the compared ones."""
        if len(self.units) <= MOST_SHOWN:
            return self.units
        compared = {unit.label for family in self.families for unit in family.units}
        return [unit for unit in self.units if unit.label in compared][:MOST_SHOWN]

    @cached_property
    def main_rows(self) -> list[Row]:
        """The trials of `main_units`, in the order of `rows`; all of a sweep of few trials."""
        if len(self.rows) <= MOST_ROWS:
            return self.rows
        shown = {row.trial_id for unit in self.main_units for row in unit.rows}
        return [row for row in self.rows if row.trial_id in shown]

    @cached_property
    def intervals(self) -> dict[str, Intervals]:
        """Differences to the base, by trial id: of all rows, or of a large sweep of those that are compared."""
        return intervals(self.main_rows, self.statistics)

    @cached_property
    def loss_intervals(self) -> dict[str, DifferenceInterval]:
        """Differences of the held-out loss to the base, by trial id: of the same rows."""
        return loss_intervals(self.main_rows, self.statistics)

    @cached_property
    def statistics(self) -> Statistics:
        """What each answered or scored row adds to the scores."""
        return Statistics(self.answers, self.losses, self.loss_tokens, self.rewards)

    @cached_property
    def benchmark_questions(self) -> Questions:
        """The further benchmarks, question by question."""
        return Questions(self.questions)

    @property
    def families(self) -> list[Family]:
        """The units that can be compared with each other."""
        return self._compared[0]

    @property
    def left_out(self) -> dict[str, str]:
        """Why a unit is in no family, by its label."""
        return self._compared[1]

    def curve(self, row: Row) -> Curve:
        """What the row's trial logged."""
        return self.curves.get(row.trial_id, Curve())

    @cached_property
    def _compared(self) -> tuple[list[Family], dict[str, str]]:
        return families(self.units, self.statistics)
