"""For every pair of rows: do the held-out rows show a difference, or are the two tied?"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import PurePath
from statistics import fmean
from typing import Literal, TypeAlias

import numpy as np

from ray_peft.metrics.intervals import (
    DifferenceInterval,
    Numbers,
    ScoreInterval,
    bleu4_parts,
    compare,
    interval,
    mean_parts,
)
from ray_peft.metrics.seeds import SeedVariance, seed_variance, together, widened
from ray_peft.report.choosing import chosen
from ray_peft.report.lineage import lineages
from ray_peft.report.recommend import tiers
from ray_peft.report.table import Row, SeedGroup
from ray_peft.report.uncertainty import Statistics

LOSS_MARGIN = 0.01
"""Where only the means of held-out losses are known: nearer than this share of the lower one they count as tied."""

FEWEST_ROWS = 6
"""With fewer held-out rows all of them favour one of two equal systems too often: 2 in 2**5 is more than 5 %."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Scores of one unit less those of another, on the rows and seeds that both have; corrected for all pairs."""

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
    """Of `values`, over the held-out rows and the seeds; none if only means are known."""
    pairs: Mapping[tuple[int, int], Pair] = field(default_factory=dict)
    """By the places of two units, the smaller first; none if only means are known."""
    rows: int = 0
    """Held-out rows behind the intervals."""
    passed_over: tuple[SeedGroup, ...] = ()
    """Settings of which another setting of the same method was better: those that `units` leaves out."""

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
        shown = pair.shown and (pair.difference > 0) == (gains == (first < second))
        if not gains:  # of the same rows, or noise, intervals of losses are narrow, so seeds have their say, too
            return shown and max(self._losses(first)) < min(self._losses(second))
        return shown and self.values[first] > self.values[second]

    def tiers(self) -> list[list[int]]:
        """The places of the units in tiers; inside a tier there is no order but that of the report."""
        return tiers(range(len(self.units)), self.better)

    def _clearly_lower(self, first: int, second: int) -> bool:
        a, b = (self._losses(place) for place in (first, second))
        return max(a) < min(b) and fmean(b) - fmean(a) > LOSS_MARGIN * abs(fmean(a))

    @property
    def model(self) -> str:
        """The name of its model, without the folders of a local one."""
        return PurePath(self.units[0].rows[0].result.spec.model.name).name

    def _losses(self, place: int) -> list[float]:
        losses = (row.eval_loss.value for row in self.units[place].finished)
        return [value for value in losses if value is not None]


def heading(family: Family, number: int, shown: Sequence[Family]) -> str:
    """What tells a family from the others that are shown: its model, or else its number."""
    names = [other.model for other in shown]
    return family.model if len(set(names)) == len(names) else f"Held-out rows {number} of {len(shown)}"


def families(units: Sequence[SeedGroup], statistics: Statistics) -> tuple[list[Family], dict[str, str]]:
    """The units put together by what can be compared, and why the others were left out, by label.

    Units of one model that answered the same held-out rows are one family, compared by ROUGE-L. Where no unit answered
    any, those with the same held-out rows and tokenizer are one family, compared by loss; row by row if those losses
    are known. `lineages` says what is one model. Of each method the family has the chosen setting alone (`choosing`).
    """
    left_out: dict[str, str] = {}
    grouped: dict[tuple[str, ...], list[SeedGroup]] = {}
    answered = any(row.trial_id in statistics for unit in units for row in unit.finished if not _random(row))
    finished = [unit for unit in units if unit.finished]
    of = dict(zip((unit.label for unit in finished), lineages([unit.finished[0] for unit in finished]), strict=True))
    for unit in units:
        if not unit.finished:
            left_out[unit.label] = "did not finish"
        elif (origin := unit.finished[0].result.spec.train.warm_start) is not None:
            left_out[unit.label] = f"started warm, from {origin.trial} after its step {origin.step}"
        elif _random(unit.finished[0]):
            left_out[unit.label] = "random weights, so its scores mean nothing"
        elif (key := _answered_rows(unit, statistics) if answered else _scored_rows(unit, statistics)) is None:
            left_out[unit.label] = "no answers on file" if answered else "no held-out loss"
        else:
            grouped.setdefault((*of[unit.label], *key), []).append(unit)
    build = _by_answers if answered else by_loss
    quality = _rouge_of(statistics) if answered else _negative_loss
    built = []
    for members in grouped.values():
        compared = chosen(members, quality)
        others = tuple(unit for unit in members if unit not in compared)
        built.append(replace(build(compared, statistics), passed_over=others))
    return built, left_out


def _rouge_of(statistics: Statistics) -> Callable[[SeedGroup], float]:
    """The mean ROUGE-L over the seeds: of the row, or of its answers where the row has none."""

    def quality(unit: SeedGroup) -> float:
        return fmean(
            row.rouge_l.value if row.rouge_l.value is not None else fmean(statistics.rouge(row.trial_id))
            for row in unit.finished
            if row.trial_id in statistics
        )

    return quality


def _negative_loss(unit: SeedGroup) -> float:
    spread = unit.spread(lambda row: row.eval_loss.value)
    return -spread.mean if spread is not None else -float("inf")


def _random(row: Row) -> bool:
    return row.result.spec.model.random_weights


def _answered_rows(unit: SeedGroup, statistics: Statistics) -> tuple[str, ...] | None:
    return next((statistics.references(row.trial_id) for row in unit.finished if row.trial_id in statistics), None)


def _scored_rows(unit: SeedGroup, statistics: Statistics) -> tuple[str, ...] | None:
    first = unit.finished[0].result
    if all(row.eval_loss.value is None for row in unit.finished):
        return None
    spec = first.spec
    split = getattr(spec.evaluation, "split", "test")
    data = (json.dumps(spec.data.plain(), sort_keys=True), first.provenance.data_key or "", split)
    if numbers := {len(values) for row in unit.finished if (values := statistics.losses.get(row.trial_id))}:
        tokens = repr([values for row in unit.finished if (values := statistics.loss_tokens.get(row.trial_id))][:1])
        if spec.task == "llm_sft":
            return (spec.model.tokenizer or spec.model.name, *data, spec.loss_line(), str(max(numbers)), tokens)
        # Losses of single images: of the same model's latents, timesteps and prediction; how training weighs is free.
        return (spec.model.name, *data, repr(spec.scored_as()), str(max(numbers)), tokens)
    return (spec.model.tokenizer or spec.model.name, *data, spec.loss_line())


def by_loss(members: Sequence[SeedGroup], statistics: Statistics) -> Family:
    """Units with the same held-out rows and tokenizer, compared by loss."""
    if all(row.trial_id in statistics.losses for unit in members for row in unit.finished):
        counts = {len(statistics.losses[row.trial_id]) for unit in members for row in unit.finished}
        weights = {statistics.loss_tokens.get(row.trial_id) for unit in members for row in unit.finished}
        if len(counts) == len(weights) == 1:
            return _by_row_losses(members, statistics, counts.pop())
    spreads = [unit.spread(lambda row: row.eval_loss.value) for unit in members]
    values = tuple(spread.mean for spread in spreads if spread is not None)
    return Family(measure="eval_loss", units=tuple(members), values=values)


def _by_row_losses(members: Sequence[SeedGroup], statistics: Statistics, rows: int) -> Family:
    @cache
    def losses(trials: tuple[str, ...]) -> Numbers:
        return _mean([statistics.loss_parts(trial) for trial in trials])

    by_seed = [{row.result.spec.seed: row.trial_id for row in unit.finished} for unit in members]
    places = trial_pairs(members, by_seed)
    # The ranges over the seeds have their say in `Family.better`, so these intervals are over rows alone.
    differences = compare([(losses(a), losses(b)) for a, b in places.values()])
    unit_intervals = [_interval(tuple(trials.values()), losses) for trials in by_seed]
    return Family(
        measure="eval_loss",
        units=tuple(members),
        values=tuple(estimate.score for estimate in unit_intervals),
        intervals=tuple(unit_intervals),
        pairs={place: Pair(quality=quality) for place, quality in zip(places, differences, strict=True)},
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
    def rouge(trials: tuple[str, ...]) -> Numbers:
        return mean_parts(_mean([statistics.rouge(trial) for trial in trials]))

    @cache
    def bleu(trials: tuple[str, ...]) -> Numbers:
        return bleu4_parts(_mean([statistics.bleu(trial) for trial in trials]))

    places = trial_pairs(members, by_seed)
    qualities = _compared(list(places.values()), rouge)
    bleus = _compared(list(places.values()), bleu)
    unit_intervals = [_interval(tuple(trials_by_seed.values()), rouge) for trials_by_seed in by_seed]
    return Family(
        measure="rouge_l",
        units=tuple(members),
        values=tuple(estimate.score for estimate in unit_intervals),
        intervals=tuple(unit_intervals),
        pairs={
            place: Pair(quality=quality, bleu4=bleu4)
            for place, quality, bleu4 in zip(places, qualities, bleus, strict=True)
        },
        rows=len(references),
    )


Trials: TypeAlias = tuple[str, ...]
"""Ids of trials that differ in their seed alone."""


def _interval(trials: Trials, parts: Callable[[Trials], Numbers]) -> ScoreInterval:
    """Of the mean over the trials, over rows and seeds."""
    estimate = interval(parts(trials))
    return widened(estimate, len(parts(trials)), _of_seeds(trials, parts))


def _compared(pairs: Sequence[tuple[Trials, Trials]], parts: Callable[[Trials], Numbers]) -> list[DifferenceInterval]:
    """Differences over rows and seeds; the p-values are those over rows, corrected for all pairs."""
    differences = compare([(parts(first), parts(second)) for first, second in pairs])
    return [
        widened(difference, len(parts(first)), _of_pair(first, second, parts))
        for difference, (first, second) in zip(differences, pairs, strict=True)
    ]


def _of_pair(first: Trials, second: Trials, parts: Callable[[Trials], Numbers]) -> SeedVariance | None:
    """What seeds add to a difference: pair by pair where both have as many, which holds for equal and other seeds."""
    if len(first) == len(second):
        pairs = zip(first, second, strict=True)
        return seed_variance([fmean(parts((a,))) - fmean(parts((b,))) for a, b in pairs])
    return together([_of_seeds(trials, parts) for trials in (first, second)])


def _of_seeds(trials: Trials, parts: Callable[[Trials], Numbers]) -> SeedVariance | None:
    return seed_variance([fmean(parts((trial,))) for trial in trials])


def _mean(runs: Sequence[object]) -> Numbers:
    """Over several runs of a system."""
    mean: Numbers = np.mean(np.asarray(runs, dtype=np.float64), axis=0)
    return mean


def trial_pairs(
    members: Sequence[SeedGroup], by_seed: Sequence[Mapping[int, str]]
) -> dict[tuple[int, int], tuple[tuple[str, ...], tuple[str, ...]]]:
    """For every two units, by their places, the trials that stand beside each other.

    Args:
        members: the units.
        by_seed: of each unit, trial ids by seed; at least one.
    """
    pairs = {}
    for first in range(len(members)):
        for second in range(first + 1, len(members)):
            seedless = any(members[place].is_base for place in (first, second))
            pairs[first, second] = _paired_seeds(by_seed[first], by_seed[second], seedless=seedless)
    return pairs


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
