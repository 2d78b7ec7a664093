"""The rows of each optimizer step, in the seeded order of accelerate's sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ray_peft.engine.contract import Rows, Seen, Share
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.encode import IGNORED, tokens_with_loss
from ray_peft.tasks.llm_sft.lanes import scored_share

if TYPE_CHECKING:
    from datasets import Dataset

MOST_STEPS_HELD = 4


@dataclass(frozen=True)
class TextPart:
    """Rows of one pass."""

    ids: Sequence[Sequence[int]]
    labels: Sequence[Sequence[int]]
    """As many as `ids`, IGNORED for tokens without loss."""
    loss_tokens: int
    """Tokens with loss in the whole step, over all workers: the divisor of the pass's loss."""
    passes: int
    """Passes of the whole step, over all workers."""
    keys: Sequence[int] = ()
    """The key from which the dropout of each row is drawn."""


class StepOrder:
    """Which rows each step sees: every epoch all of them once, in an order of its own; its last step may hold fewer."""

    def __init__(self, spec: LlmTrialSpec, rows: int) -> None:
        """Set up the steps of a trial with so many training rows."""
        self._spec, self._rows = spec, rows
        self._per_epoch = math.ceil(rows / spec.train.batch_size)
        self._orders: dict[int, list[int]] = {}

    def places(self, step: int) -> list[int]:
        """The rows of a step in order, as indices into the data."""
        epoch, batch = divmod(step, self._per_epoch)
        if epoch not in self._orders:
            from accelerate.data_loader import SeedableRandomSampler

            sampler = SeedableRandomSampler(range(self._rows), data_seed=self._spec.seed)
            sampler.set_epoch(epoch)
            # The previous epoch is kept, too: a rehearsal looks ahead, and training then goes on where it was.
            self._orders = {number: order for number, order in self._orders.items() if number >= epoch - 1}
            self._orders[epoch] = list(sampler)
        size = self._spec.train.batch_size
        return self._orders[epoch][batch * size : (batch + 1) * size]

    def epoch(self, steps: int) -> float:
        """Epochs after `steps` steps; a partial last step counts as a whole one."""
        return steps / self._per_epoch

    def batches(self, rows: int) -> list[range]:
        """The micro-batches of a step of `rows` rows."""
        size = self._spec.train.micro_batch_size
        return [range(first, min(first + size, rows)) for first in range(0, rows, size)]

    def spans(self, rows: int, most: int) -> list[tuple[int, int]]:
        """The passes of a step of `rows` rows, of at most `most` rows each: (first, last), last excluded."""
        return [span for batch in self.batches(rows) for span in spans(batch, most)]

    def heaviest(self, steps: range, lengths: Sequence[int], most: int) -> tuple[int, int]:
        """The step with the pass of the most tokens, padding included, and the place of this pass in it.

        Args:
            steps: those to choose from; a later epoch has the same rows in another order, so its passes may be larger.
            lengths: tokens of every row of the data.
            most: most rows of a pass.
        """

        def tokens(step: int) -> list[int]:
            own = [lengths[place] for place in self.places(step)]
            return [(last - first) * max(own[first:last]) for first, last in self.spans(len(own), most)]

        step, passes = max(((step, tokens(step)) for step in steps), key=lambda choice: max(choice[1]))
        return step, passes.index(max(passes))


class TextRows(Rows[TextPart]):
    """The training rows of a trial, step by step."""

    def __init__(self, spec: LlmTrialSpec, rows: Dataset) -> None:
        """Set up the steps.

        Args:
            spec: the trial.
            rows: with columns input_ids and labels.
        """
        self._spec, self._data = spec, rows
        self._order = StepOrder(spec, len(rows))
        self._steps: dict[int, tuple[list[list[int]], list[list[int]], int]] = {}
        self._lengths: list[int] = []

    @property
    def micro_batch(self) -> int:
        """Rows of a micro-batch."""
        return self._spec.train.micro_batch_size

    def loss_tokens(self, step: int) -> int:
        """Tokens with loss of a whole step."""
        return self._step(step)[2]

    @cached_property
    def scored_share(self) -> float:
        """The share of places that are scored; all of them if every token carries loss."""
        if self._spec.train.loss == "all":
            return 1.0
        labels = self._data["labels"]
        scored = sum(label != IGNORED for row in labels for label in row)
        return scored_share(scored, sum(self.lengths()))

    def lengths(self) -> list[int]:
        """Tokens of every row of the data."""
        if not self._lengths:
            self._lengths = [len(ids) for ids in self._data["input_ids"]]
        return self._lengths

    def places(self, step: int) -> list[int]:
        """The rows of a step in order, as indices into the data."""
        return self._order.places(step)

    def parts(self, step: int, share: Share, rows: int) -> list[TextPart]:
        """A worker's rows of a step: of every `share.workers` micro-batches one, in passes of at most `rows` rows."""
        from ray_peft.engine.keyed_dropout import row_key

        ids, labels, loss_tokens = self._step(step)
        batches = self._order.batches(len(ids))
        passes = len(self._order.spans(len(ids), rows))
        keys = [row_key(self._spec.seed, step, row) for row in range(len(ids))]
        return [
            TextPart(ids[first:last], labels[first:last], loss_tokens, passes, keys[first:last])
            for batch in batches[share.rank :: share.workers]
            for first, last in spans(batch, rows)
        ]

    def size(self, part: TextPart) -> int:
        """Rows of a pass."""
        return len(part.ids)

    def seen(self, step: int) -> Seen:
        """The tokens of a step."""
        ids = self._step(step)[0]
        return Seen(tokens=sum(map(len, ids)))

    def epoch(self, steps: int) -> float:
        """Epochs after `steps` steps; a partial last step counts as a whole one."""
        return self._order.epoch(steps)

    def heaviest(self, steps: range, rows: int) -> TextPart | None:
        """The largest pass of `steps`: the one with the most tokens, padding included."""
        step, place = self._order.heaviest(steps, self.lengths(), rows)
        return self.parts(step, Share(), rows)[place]

    def _step(self, step: int) -> tuple[list[list[int]], list[list[int]], int]:
        """Token ids and labels of a step's rows, and how many of their tokens carry loss."""
        if step not in self._steps:
            while len(self._steps) >= MOST_STEPS_HELD:
                self._steps.pop(next(iter(self._steps)))
            rows = self._data[self.places(step)]
            labels = rows["input_ids"] if self._spec.train.loss == "all" else rows["labels"]
            self._steps[step] = (rows["input_ids"], labels, sum(map(tokens_with_loss, labels)))
        return self._steps[step]


def spans(batch: range, rows: int) -> list[tuple[int, int]]:
    """A micro-batch in pieces of at most `rows` rows: (first, last), last excluded."""
    return [(first, min(first + rows, batch.stop)) for first in range(batch.start, batch.stop, rows)]
