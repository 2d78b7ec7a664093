"""The pairs, or labelled rows, of each optimizer step, in the order that instruction tuning gives the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ray_peft.engine.contract import Rows, Seen, Share
from ray_peft.engine.keyed_dropout import row_key
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.encode import IGNORED
from ray_peft.tasks.llm_sft.preference.rows import longest_row, mismatched, side_columns
from ray_peft.tasks.llm_sft.steps import StepOrder, spans

if TYPE_CHECKING:
    from datasets import Dataset

REFERENCE = "log_probs_before"
"""The column with the log-probabilities of a row's sides under the model before training."""


@dataclass(frozen=True)
class Scored:
    """The tokens of a side whose log-probabilities the objective needs."""

    places: Sequence[int]
    """In their row; each is predicted from the place before."""
    in_answer: Sequence[float]
    """For each, 1 if it counts in the log-probability of the answer, else 0."""
    own_loss: bool
    """Whether they count in the chosen answer's own loss."""

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answer; 1 of an answer without any, since means divide by it."""
        return max(int(sum(self.in_answer)), 1)


def scored_tokens(spec: LlmTrialSpec, labels: Sequence[int], *, chosen: bool) -> Scored:
    """The scored tokens of a side with these labels."""
    own_loss = chosen and spec.train.objective == "orpo"
    if own_loss and spec.train.loss == "all":
        return Scored(range(1, len(labels)), [float(label != IGNORED) for label in labels[1:]], own_loss)
    places = [place for place, label in enumerate(labels) if label != IGNORED and place]
    return Scored(places, [1.0] * len(places), own_loss)


@dataclass(frozen=True)
class Side:
    """A prompt with one answer."""

    ids: Sequence[int]
    scored: Scored
    reference: float
    """Log-probability of the answer under the model before training; 0 where the objective needs none."""
    key: int
    """The key from which its dropout is drawn."""


@dataclass(frozen=True)
class Judged:
    """A pair, or a labelled row, as a pass computes it."""

    sides: Sequence[Side]
    """Chosen and rejected; or the answer alone."""
    desirable: bool = True
    """Of a labelled row, whether its answer is good."""

    @property
    def tokens(self) -> int:
        """Of all sides."""
        return sum(len(side.ids) for side in self.sides)


@dataclass(frozen=True)
class Totals:
    """What a whole step holds, over all workers: the divisors of its losses."""

    judged: int
    """Pairs, or labelled rows."""
    own_loss_tokens: int
    """Tokens of the chosen answers' own loss, which ORPO adds."""
    passes: int


@dataclass(frozen=True)
class PreferencePart:
    """What one pass holds."""

    judged: Sequence[Judged]
    totals: Totals
    divergence: bool = False
    """Whether these rows tell how far the model has gone from what it was, and are not trained on: kto's first passes
    of a step. Their sides are prompts with answers of other rows."""
    begins: bool = False
    """Whether a step's estimate of that begins with this pass."""


class PreferenceRows(Rows[PreferencePart]):
    """The training rows of a trial, step by step: pairs for dpo and orpo, labelled rows for kto."""

    def __init__(self, spec: LlmTrialSpec, rows: Dataset) -> None:
        """Set up the steps.

        Args:
            spec: the trial.
            rows: with columns input_ids and labels, and rejected_ids and rejected_labels (of pairs) or desirable; and
                with REFERENCE, but for orpo.
        """
        self._spec, self._data = spec, rows
        self._order = StepOrder(spec, len(rows))

    def parts(self, step: int, share: Share, rows: int) -> list[PreferencePart]:
        """A worker's part of a step: of every `share.workers` micro-batches one, in passes of at most `rows`."""
        judged = self.judged(step)
        totals = self.totals(judged, rows)
        batches = self._order.batches(len(judged))[share.rank :: share.workers]
        own = [span for batch in batches for span in spans(batch, rows)]
        parts = [PreferencePart(judged[first:last], totals) for first, last in own]
        if self._spec.train.objective != "kto":
            return parts
        others = self.mismatched(step)
        return [PreferencePart(others[first:last], totals, True, not first) for first, last in own] + parts

    def judged(self, step: int) -> list[Judged]:
        """All pairs or labelled rows of a step, in order."""
        return [self._judged(step, index, place) for index, place in enumerate(self.places(step))]

    def mismatched(self, step: int) -> list[Judged]:
        """Each labelled row of a step with the answer of the row before it in the data."""
        places = self.places(step)
        rows = []
        for index, place in enumerate(places):
            row = self._data[place]
            ids, labels = mismatched(row, self._data[place - 1], self._longest_row)
            key = row_key(self._spec.seed, step, len(places) + index)
            scored = scored_tokens(self._spec, labels, chosen=True)
            rows.append(Judged([Side(ids, scored, row[REFERENCE][1], key)], row["desirable"]))
        return rows

    def totals(self, judged: Sequence[Judged], rows: int) -> Totals:
        """The divisors of a step that is passed `rows` at a time."""
        own_loss = sum(len(side.scored.places) for row in judged for side in row.sides if side.scored.own_loss)
        return Totals(len(judged), own_loss, len(self._order.spans(len(judged), rows)))

    def size(self, part: PreferencePart) -> int:
        """Pairs, or labelled rows, of a pass."""
        return len(part.judged)

    def seen(self, step: int) -> Seen:
        """The tokens of a step, of all sides."""
        return Seen(tokens=sum(sum(self.lengths[place]) for place in self.places(step)))

    def epoch(self, steps: int) -> float:
        """Epochs after `steps` steps; a partial last step counts as a whole one."""
        return self._order.epoch(steps)

    def heaviest(self, steps: range, rows: int) -> PreferencePart | None:
        """The largest pass of `steps`: the one with the most tokens, padding included."""
        step, place = self._order.heaviest(steps, list(map(max, self.lengths)), rows)
        return [part for part in self.parts(step, Share(), rows) if not part.divergence][place]

    def places(self, step: int) -> list[int]:
        """What a step sees, as indices into the data."""
        return self._order.places(step)

    @property
    def micro_batch(self) -> int:
        """Pairs, or labelled rows, of a micro-batch."""
        return self._spec.train.micro_batch_size

    @cached_property
    def lengths(self) -> list[list[int]]:
        """Tokens of the sides of every pair or labelled row of the data."""
        sides = (map(len, self._data[ids]) for ids, _ in side_columns(self._data))
        return [list(lengths) for lengths in zip(*sides, strict=True)]

    @cached_property
    def _longest_row(self) -> int:
        return longest_row(self._data)

    @cached_property
    def scored_tokens(self) -> int:
        """Tokens of all rows whose log-probabilities the objective needs."""
        return sum(
            len(scored_tokens(self._spec, labels, chosen=not side).places)
            for side, (_, column) in enumerate(side_columns(self._data))
            for labels in self._data[column]
        )

    def _judged(self, step: int, index: int, place: int) -> Judged:
        row: dict[str, Any] = self._data[place]
        columns = side_columns(self._data)
        references = row.get(REFERENCE, [0.0] * len(columns))
        sides = []
        for side, (ids, labels) in enumerate(columns):
            key = row_key(self._spec.seed, step, len(columns) * index + side)
            scored = scored_tokens(self._spec, row[labels], chosen=not side)
            sides.append(Side(row[ids], scored, references[side], key))
        return Judged(sides, row.get("desirable", True))
