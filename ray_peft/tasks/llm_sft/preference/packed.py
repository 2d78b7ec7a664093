"""A pass of pairs, or labelled rows, of static shape: both sides of a pair lie in one lane, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_peft.engine.contract import Computation, Rows, Seen, Share
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.lanes import Bucket, largest_capacity, lay_out, reused, scored_share
from ray_peft.tasks.llm_sft.packed import PackedLoss, lay
from ray_peft.tasks.llm_sft.preference.objective import ROWS, TOKENS, Objective
from ray_peft.tasks.llm_sft.preference.steps import Judged, PreferencePart, PreferenceRows, Totals

if TYPE_CHECKING:
    from torch import Tensor

    from ray_peft.engine.row_dropout import RowDropout


@dataclass(frozen=True)
class PackedPreferences:
    """What one pass holds, laid into its lanes."""

    bucket: Bucket
    lanes: Sequence[Sequence[Judged]]
    totals: Totals
    scored: float
    """Share of the places that are scored; all are if more than this share counts."""

    divergence: bool = False
    begins: bool = False
    """As in `PreferencePart`."""

    def unpacked(self) -> PreferencePart:
        """The same rows, each side by itself."""
        return PreferencePart([row for lane in self.lanes for row in lane], self.totals, self.divergence, self.begins)


class PackedPreferenceRows(Rows[PackedPreferences]):
    """The rows of a trial's steps, in passes of few static shapes."""

    def __init__(self, rows: PreferenceRows) -> None:
        """Measure the rows: the longest decides how many tokens a pass of a number of rows may hold."""
        self._rows = rows
        self._lengths = [sum(sides) for sides in rows.lengths]
        self._largest = largest_capacity(max(self._lengths))
        self._scored = scored_share(rows.scored_tokens, sum(self._lengths))
        self._used: set[Bucket] = set()

    def parts(self, step: int, share: Share, rows: int) -> list[PackedPreferences]:
        """A worker's part of a step, in passes of at most as many tokens as `rows` of the longest pair."""
        parts = self._rows.parts(step, share, self._rows.micro_batch)
        packed = []
        for divergence in (True, False):
            judged = [row for part in parts if part.divergence == divergence for row in part.judged]
            most = rows * self._largest
            plans = lay_out([row.tokens for row in judged], most, self._largest)
            for number, plan in enumerate(reused(plan, self._used, most) for plan in plans):
                lanes = [[judged[row] for row in lane] for lane in plan.lanes]
                packed.append(
                    PackedPreferences(plan.bucket, lanes, parts[0].totals, self._scored, divergence, not number)
                )
        return packed

    def size(self, part: PackedPreferences) -> int:
        """The size of a pass in pairs: how many of the longest pair have as many tokens."""
        return -(-part.bucket.tokens // self._largest)

    def seen(self, step: int) -> Seen:
        """The tokens of a step."""
        return self._rows.seen(step)

    def epoch(self, steps: int) -> float:
        """Epochs after `steps` steps."""
        return self._rows.epoch(steps)

    def heaviest(self, steps: range, rows: int) -> PackedPreferences | None:
        """The pass with the most tokens among those of `steps`."""

        def tokens(step: int) -> int:
            own = [self._lengths[place] for place in self._rows.places(step)]
            return max(plan.bucket.tokens for plan in lay_out(own, rows * self._largest, self._largest))

        heaviest = max(steps, key=tokens)
        trained = [part for part in self.parts(heaviest, Share(), rows) if not part.divergence]
        return max(trained, key=lambda part: part.bucket.tokens)


LANES = 5
"""How many tensors tell the lanes of a pass and what is scored in them, without dropout."""


class PackedPreferenceLoss(Computation[PackedPreferences]):
    """What `PreferenceLoss` computes, on packed rows; the bucket decides the shape of every tensor."""

    keeps_gradients = True

    def __init__(self, spec: LlmTrialSpec, model: Any, dropout: RowDropout | None = None) -> None:
        """Set up the loss; arguments are those of `PackedLoss`."""
        self._objective = Objective(spec)
        self._lanes = PackedLoss(spec, model)
        self._dropout = dropout
        self._slots = spec.train.batch_size
        """No pass holds more pairs than a step."""
        self._count = TOKENS + ROWS + LANES + (dropout is not None)
        """Tensors of a pass that is trained on; one that is not has one more."""

    def inputs(self, part: PackedPreferences) -> Sequence[Tensor]:
        """The tensors of a pass.

        Those of `Objective.tokens` and `Objective.rows`; then ids, positions and numbers of sides (lanes, capacity) and
        the scored places in the flattened lanes with their targets, as in `PackedLoss`. With dropout by the row, also
        the keys of tokens (lanes, capacity) int64. For a pass that is not trained on, also whether the estimate goes
        on, () float32.
        """
        import torch

        sides = [[side for row in lane for side in row.sides] for lane in part.lanes]
        keys = [[side.key for side in lane] for lane in sides] if self._dropout is not None else None
        laid = lay(part.bucket, [[side.ids for side in lane] for lane in sides], keys)
        judged = part.unpacked().judged
        begins = [begin for lane in laid.begins for begin in lane]
        scored = [side.scored for row in judged for side in row.sides]
        places = [begin + place - 1 for begin, tokens in zip(begins, scored, strict=True) for place in tokens.places]
        flat = laid.ids.flatten()
        targets = flat[torch.tensor(places, dtype=torch.int64) + 1]
        count = part.bucket.scored_places(part.scored, len(places))
        fill = count - len(places)
        return [
            *self._objective.tokens(judged, part.totals, self._slots, part.bucket.capacity, count),
            *self._objective.rows(judged, part.totals, self._slots),
            laid.ids,
            laid.positions,
            laid.documents,
            torch.tensor(places + [0] * fill),
            torch.cat([targets, targets.new_zeros(fill)]),
            *([laid.keys] if laid.keys is not None else []),
            *([torch.tensor(0.0 if part.begins else 1.0)] if part.divergence else []),
        ]

    def compared(self, *inputs: Tensor) -> Tensor:
        """Log-probability () of all scored tokens of a pass.

        The loss has the difference of two, which is small at first, so that rounding is large beside it.
        """
        _, in_answer, own_loss = inputs[:TOKENS]
        return (self._log_probs(inputs) * ((in_answer > 0) | (own_loss > 0))).sum()

    def _log_probs(self, inputs: Sequence[Tensor]) -> Tensor:
        """Log-probabilities of the scored places (places,) float32."""
        ids, positions, documents, places, targets, *keys = inputs[TOKENS + ROWS : self._count]
        if self._dropout is not None:
            self._dropout.begin(keys[0], positions)
        return self._lanes.log_probs(ids, positions, documents, places, targets)

    def loss(self, *inputs: Tensor) -> Tensor:
        """The pass's share of the step's loss."""
        import torch

        tokens, rows = inputs[:TOKENS], inputs[TOKENS : TOKENS + ROWS]
        width = inputs[TOKENS + ROWS].shape[1]
        with torch.set_grad_enabled(len(inputs) == self._count):
            log_probs = self._log_probs(inputs)
        if len(inputs) > self._count:
            return self._objective.estimate(log_probs, width, tokens, rows, inputs[-1])
        return self._objective.loss(log_probs, width, tokens, rows)
