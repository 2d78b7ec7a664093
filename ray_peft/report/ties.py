"""Every pair of rows: is their difference one that the held-out rows can show, or are they tied?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import fmean
from typing import Literal

import numpy as np

from ray_peft.metrics.bootstrap import (
    DifferenceInterval,
    Resampled,
    ScoreInterval,
    difference,
    resampled_bleu4,
    resampled_mean,
    score_interval,
)
from ray_peft.report.recommend import tiers
from ray_peft.report.table import Row, SeedGroup
from ray_peft.report.uncertainty import CONFIDENCE, Statistics

LOSS_MARGIN = 0.01
"""Held-out losses have no interval: nearer than this share of the lower one they count as tied."""

FEWEST_ROWS = 6
"""With fewer held-out rows all of them favour one of two equal rows too often: 2 in 2**5 is more than 5 %."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Scores of one unit less those of another, on the rows and seeds that both have."""

    quality: DifferenceInterval
    """Of ROUGE-L, or of the held-out loss."""
    bleu4: DifferenceInterval | None = None
    """None where nothing was answered."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Units that can be compared with each other."""

    measure: Literal["rouge_l", "eval_loss"]
    """What quality is here."""
    units: tuple[SeedGroup, ...]
    values: tuple[float, ...]
    """Quality of each unit: the mean over its seeds."""
    intervals: tuple[ScoreInterval, ...] = ()
    """Of `values`, over the held-out rows; none if only means are known."""
    pairs: Mapping[tuple[int, int], Pair] = field(default_factory=dict)
    """By the places of two units, the smaller first; none if only means are known."""
    rows: int = 0
    """Held-out rows behind the intervals."""

    @property
    def paired(self) -> bool:
        """Whether differences have intervals: the score or the loss of every held-out row is known."""
        return self.rows > 0

    def better(self, first: int, second: int) -> bool:
        """Whether the first unit is shown to be better than the second.

        Never so against the order of `values`, which seeds that only one of them has may turn round.
        """
        if not self.paired:
            return self._clearly_lower(first, second)
        if self.rows < FEWEST_ROWS:
            return False
        pair = self.pairs[min(first, second), max(first, second)].quality
        gains = self.measure == "rouge_l"
        shown = pair.low > 0 if gains == (first < second) else pair.high < 0
        if not gains:  # the same noise for all makes intervals of losses narrow, so seeds have their say, too
            return shown and max(self._losses(first)) < min(self._losses(second))
        return shown and self.values[first] > self.values[second]

    def tiers(self) -> list[list[int]]:
        """The places of the units in tiers; inside a tier there is no order but that of the report."""
        return tiers(range(len(self.units)), self.better)

    def _clearly_lower(self, first: int, second: int) -> bool:
        a, b = (self._losses(place) for place in (first, second))
        return max(a) < min(b) and fmean(b) - fmean(a) > LOSS_MARGIN * abs(fmean(a))

    def _losses(self, place: int) -> list[float]:
        found = (row.eval_loss.value for row in self.units[place].finished)
        return [value for value in found if value is not None]


def families(units: Sequence[SeedGroup], statistics: Statistics) -> tuple[list[Family], dict[str, str]]:
    """The units put together by what can be compared, and why the others were left out, by label.

    Units that answered the same held-out rows are one family, compared by ROUGE-L. Where no unit answered any, those
    with the same held-out rows and tokenizer are one family, compared by loss; row by row if those losses are known.
    """
    left_out: dict[str, str] = {}
    grouped: dict[tuple[str, ...], list[SeedGroup]] = {}
    answered = any(row.trial_id in statistics for unit in units for row in unit.finished if not _random(row))
    for unit in units:
        if not unit.finished:
            left_out[unit.label] = "did not finish"
        elif _random(unit.finished[0]):
            left_out[unit.label] = "random weights, so its scores mean nothing"
        elif (key := _answered_rows(unit, statistics) if answered else _scored_rows(unit, statistics)) is None:
            left_out[unit.label] = "no answers on file" if answered else "no held-out loss"
        else:
            grouped.setdefault(key, []).append(unit)
    build = _by_answers if answered else _by_loss
    return [build(members, statistics) for members in grouped.values()], left_out


def _random(row: Row) -> bool:
    return row.result.spec.model.random_weights


def _answered_rows(unit: SeedGroup, statistics: Statistics) -> tuple[str, ...] | None:
    return next((statistics.references(row.trial_id) for row in unit.finished if row.trial_id in statistics), None)


def _scored_rows(unit: SeedGroup, statistics: Statistics) -> tuple[str, ...] | None:
    first = unit.finished[0].result
    if all(row.eval_loss.value is None for row in unit.finished):
        return None
    spec = first.spec
    tokenizer = spec.model.tokenizer or spec.model.name
    data = json.dumps(spec.data.plain(), sort_keys=True)
    if numbers := {len(found) for row in unit.finished if (found := statistics.losses.get(row.trial_id))}:
        # Losses of single rows: of the same model's latents, timesteps and prediction; how training weighs is free.
        return (spec.model.name, data, first.provenance.data_key or "", repr(spec.scored_as()), str(max(numbers)))
    return (tokenizer, data, first.provenance.data_key or "", spec.loss_line())


def _by_loss(members: Sequence[SeedGroup], statistics: Statistics) -> Family:
    if all(row.trial_id in statistics.losses for unit in members for row in unit.finished):
        counts = {len(statistics.losses[row.trial_id]) for unit in members for row in unit.finished}
        if len(counts) == 1:
            return _by_row_losses(members, statistics, counts.pop())
    spreads = [unit.spread(lambda row: row.eval_loss.value) for unit in members]
    values = tuple(spread.mean for spread in spreads if spread is not None)
    return Family(measure="eval_loss", units=tuple(members), values=values)


def _by_row_losses(members: Sequence[SeedGroup], statistics: Statistics, rows: int) -> Family:
    @cache
    def losses(trials: tuple[str, ...]) -> Resampled:
        return resampled_mean(np.mean([statistics.losses[trial] for trial in trials], axis=0).tolist())

    by_seed = [{row.result.spec.seed: row.trial_id for row in unit.finished} for unit in members]
    alone = [losses(tuple(found.values())) for found in by_seed]
    return Family(
        measure="eval_loss",
        units=tuple(members),
        values=tuple(one.score for one in alone),
        intervals=tuple(score_interval(one, confidence=CONFIDENCE) for one in alone),
        pairs={
            places: Pair(quality=difference(losses(a), losses(b), confidence=CONFIDENCE))
            for places, (a, b) in _trial_pairs(members, by_seed).items()
        },
        rows=rows,
    )


def _by_answers(members: Sequence[SeedGroup], statistics: Statistics) -> Family:
    references = _answered_rows(members[0], statistics)
    assert references is not None
    by_seed = [
        {
            row.result.spec.seed: row.trial_id
            for row in unit.finished
            if row.trial_id in statistics and statistics.references(row.trial_id) == references
        }
        for unit in members
    ]

    @cache
    def rouge(trials: tuple[str, ...]) -> Resampled:
        return resampled_mean(np.mean([statistics.rouge(trial) for trial in trials], axis=0).tolist())

    @cache
    def bleu(trials: tuple[str, ...]) -> Resampled:
        return resampled_bleu4(np.mean([statistics.bleu(trial) for trial in trials], axis=0))

    pairs = {
        places: Pair(
            quality=difference(rouge(a), rouge(b), confidence=CONFIDENCE),
            bleu4=difference(bleu(a), bleu(b), confidence=CONFIDENCE),
        )
        for places, (a, b) in _trial_pairs(members, by_seed).items()
    }
    alone = [rouge(tuple(found.values())) for found in by_seed]
    return Family(
        measure="rouge_l",
        units=tuple(members),
        values=tuple(one.score for one in alone),
        intervals=tuple(score_interval(one, confidence=CONFIDENCE) for one in alone),
        pairs=pairs,
        rows=len(references),
    )


def _trial_pairs(
    members: Sequence[SeedGroup], by_seed: Sequence[Mapping[int, str]]
) -> dict[tuple[int, int], tuple[tuple[str, ...], tuple[str, ...]]]:
    """For every two units, by their places, the trials that stand beside each other."""
    found = {}
    for first in range(len(members)):
        for second in range(first + 1, len(members)):
            seedless = any(members[place].is_base for place in (first, second))
            found[first, second] = _paired_seeds(by_seed[first], by_seed[second], seedless=seedless)
    return found


def _paired_seeds(
    first: Mapping[int, str], second: Mapping[int, str], *, seedless: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The trials of the seeds that both have, in the same order; all trials where they share none.

    Args:
        first: trial ids by seed.
        second: the same of the other unit.
        seedless: one of them is the untouched base, which no seed changes: all trials of both.
    """
    shared = [seed for seed in first if seed in second]
    if not shared or seedless:
        return tuple(first.values()), tuple(second.values())
    return tuple(first[seed] for seed in shared), tuple(second[seed] for seed in shared)
