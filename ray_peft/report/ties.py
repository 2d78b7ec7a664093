"""For every pair of rows: do the held-out rows show a difference, or are the two tied?"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import PurePath
from statistics import fmean
from typing import Literal

from ray_peft.metrics.intervals import (
    DifferenceInterval,
    Numbers,
    ScoreInterval,
    bleu4_parts,
    mean_parts,
)
from ray_peft.report.choosing import chosen
from ray_peft.report.lineage import lineages
from ray_peft.report.paired import Trials, compared, compared_over_rows, mean_of_runs, over_rows_and_seeds, trial_pairs
from ray_peft.report.recommend import tiers, unbeaten
from ray_peft.report.table import Row, SeedGroup
from ray_peft.report.uncertainty import Statistics

LOSS_MARGIN = 0.01
"""Where only the means of held-out losses are known: nearer than this share of the lower one they count as tied."""

FEWEST_ROWS = 6
"""With fewer held-out rows all of them favour one of two equal systems too often: 2 in 2**5 is more than 5 %."""


Measure = Literal["rouge_l", "reward_accuracy", "eval_loss", "preference_loss"]

MEASURES: dict[Measure, str] = {
    "rouge_l": "ROUGE-L",
    "reward_accuracy": "reward accuracy",
    "eval_loss": "held-out loss",
    "preference_loss": "DPO's loss",
}
"""What quality is, inside a sentence."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Scores of one unit less those of another, on the rows and seeds that both have; corrected for all pairs."""

    quality: DifferenceInterval
    """Of the family's measure."""
    bleu4: DifferenceInterval | None = None
    """None where nothing was answered."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Units that can be compared with each other."""

    measure: Measure
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
    losses: Family | None = None
    """The same units compared by the loss of the same rows, of pairs by DPO's, which decides where the measure shows no
    difference: it takes fewer rows to show one. None if the measure is a loss, or those of the rows are not known."""

    @property
    def gains(self) -> bool:
        """Whether a higher value is better."""
        return self.measure in ("rouge_l", "reward_accuracy")

    @property
    def measure_name(self) -> str:
        """What quality is, inside a sentence."""
        return MEASURES[self.measure]

    @property
    def measure_title(self) -> str:
        """The same with a capital."""
        return self.measure_name[0].upper() + self.measure_name[1:]

    @property
    def loss_name(self) -> str:
        """The loss that decides where the measure does not, inside a sentence."""
        return MEASURES["preference_loss"] if self.measure == "reward_accuracy" else "the loss"

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
        shown = pair.shown and (pair.difference > 0) == (self.gains == (first < second))
        if self.measure == "eval_loss":
            # Of the same rows, or noise, intervals of losses are narrow, so seeds have their say, too.
            return shown and max(self._losses(first)) < min(self._losses(second))
        return shown and (self.values[first] > self.values[second]) == self.gains

    def tiers(self) -> list[list[int]]:
        """The places of the units in tiers; inside a tier there is no order but that of the report."""
        return tiers(range(len(self.units)), self.better)

    def best(self) -> list[int]:
        """The places that none is shown to be better than by the measure, nor, among these, by the loss."""
        best = self.tiers()[0]
        return best if self.losses is None else unbeaten(best, self.losses.better)

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
    are known. Where units learned preferences, these are compared by reward accuracy instead. `lineages` says what is
    one model. Of each method the family has the chosen setting alone (`choosing`).
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
    build, quality = (_by_answers, _rouge_of(statistics)) if answered else (by_loss, _negative_loss)
    if not answered and learns_preferences(finished, statistics):
        build, quality = by_rewards, _reward_accuracy
    built = []
    for members in grouped.values():
        best = chosen(members, quality)
        others = tuple(unit for unit in members if unit not in best)
        family = build(best, statistics)
        built.append(replace(family, passed_over=others, losses=_losses(family, statistics)))
    return built, left_out


def _losses(family: Family, statistics: Statistics) -> Family | None:
    """The units of a family compared by the loss of every row; None if they already are, or if some are not known."""
    if family.measure == "reward_accuracy":
        return by_rewards(family.units, statistics, "preference_loss")
    finished = [row for unit in family.units for row in unit.finished]
    if family.measure != "rouge_l" or any(row.trial_id not in statistics.losses for row in finished):
        return None
    losses = by_loss(family.units, statistics)
    return losses if losses.paired else None


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


def _reward_accuracy(unit: SeedGroup) -> float:
    spread = unit.spread(lambda row: row.result.scores.reward_accuracy)
    return spread.mean if spread is not None else -float("inf")


def learns_preferences(units: Sequence[SeedGroup], statistics: Statistics) -> bool:
    """Whether units were trained to prefer answers, and the rewards of every held-out row of all of them are known."""
    rows = [row for unit in units for row in unit.finished if not _random(row)]
    objectives = {getattr(row.result.spec.train, "objective", "sft") for row in rows}
    return bool(objectives - {"sft"}) and all(row.trial_id in statistics.rewards for row in rows)


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
    def losses(trials: Trials) -> Numbers:
        return mean_of_runs([statistics.loss_parts(trial) for trial in trials])

    # The ranges over the seeds have their say in `Family.better`, so these differences are over rows alone.
    return _by_parts("eval_loss", members, losses, rows, compared_over_rows)


def by_rewards(
    members: Sequence[SeedGroup],
    statistics: Statistics,
    measure: Literal["reward_accuracy", "preference_loss"] = "reward_accuracy",
) -> Family:
    """Units with the same judged held-out rows, compared by how often they rate the better answer higher.

    Or by DPO's loss of each row, of which fewer rows show a difference: it says by how much, too.
    """
    of_trial = statistics.right if measure == "reward_accuracy" else statistics.dpo_losses

    @cache
    def parts(trials: Trials) -> Numbers:
        return mean_parts(mean_of_runs([of_trial(trial) for trial in trials]))

    rows = len(of_trial(members[0].finished[0].trial_id))
    return _by_parts(measure, members, parts, rows, compared)


def _by_parts(
    measure: Measure,
    members: Sequence[SeedGroup],
    parts: Callable[[Trials], Numbers],
    rows: int,
    compare_all: Callable[[Sequence[tuple[Trials, Trials]], Callable[[Trials], Numbers]], list[DifferenceInterval]],
) -> Family:
    """Units compared by what every row adds to the mean of a measure over trials."""
    by_seed = [{row.result.spec.seed: row.trial_id for row in unit.finished} for unit in members]
    places = trial_pairs(members, by_seed)
    differences = compare_all(list(places.values()), parts)
    unit_intervals = [over_rows_and_seeds(tuple(trials.values()), parts) for trials in by_seed]
    return Family(
        measure=measure,
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
        return mean_parts(mean_of_runs([statistics.rouge(trial) for trial in trials]))

    @cache
    def bleu(trials: tuple[str, ...]) -> Numbers:
        return bleu4_parts(mean_of_runs([statistics.bleu(trial) for trial in trials]))

    places = trial_pairs(members, by_seed)
    qualities = compared(list(places.values()), rouge)
    bleus = compared(list(places.values()), bleu)
    unit_intervals = [over_rows_and_seeds(tuple(trials_by_seed.values()), rouge) for trials_by_seed in by_seed]
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
