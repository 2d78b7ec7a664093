"""Passes with the rows of several members, each in lanes of its own, and the loss of each member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_peft.engine.contract import Rows, Seen, Share
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.lanes import Bucket, largest_capacity, lay_out, lay_out_apart, reused
from ray_peft.tasks.llm_sft.packed import PackedLoss, PackedPart
from ray_peft.tasks.llm_sft.steps import TextRows

if TYPE_CHECKING:
    from torch import Tensor

    from ray_peft.engine.slots import Slots


@dataclass(frozen=True)
class _Seated:
    """The rows of the member in a slot."""

    rows: TextRows
    ahead: int
    """The member's step minus the number of the round."""


class RowsTogether(Rows[PackedPart]):
    """The rows of each round: of every member its own next step."""

    def __init__(self, rows: Sequence[TextRows]) -> None:
        """Measure the rows of all trials that may become members: the longest row decides the largest shape."""
        self._largest = largest_capacity(max(max(data.lengths()) for data in rows))
        self._scored = max(data.scored_share for data in rows)
        self._seats: dict[int, _Seated] = {}
        self._used: set[Bucket] = set()

    def holds(self, rows: TextRows) -> bool:
        """Whether a trial that was not measured may become a member: its rows are no longer than the largest shape."""
        return max(rows.lengths()) <= self._largest

    def seat(self, slot: int, rows: TextRows, ahead: int) -> None:
        """From now on, round `number` has step `number + ahead` of `rows` in `slot`."""
        self._seats[slot] = _Seated(rows, ahead)

    def free(self, slot: int) -> None:
        """From now on, rounds have no rows in `slot`."""
        del self._seats[slot]

    def parts(self, step: int, share: Share, rows: int) -> list[PackedPart]:
        """The rows of a round, in passes of at most as many tokens as `rows` of the longest row."""
        own = [
            (slot, ids, labels, seat.rows.loss_tokens(step + seat.ahead), key)
            for slot, seat in sorted(self._seats.items())
            for part in seat.rows.parts(step + seat.ahead, share, seat.rows.micro_batch)
            for ids, labels, key in zip(part.ids, part.labels, part.keys, strict=True)
        ]
        most = rows * self._largest
        plans = lay_out_apart([len(ids) for _, ids, *_ in own], most, self._largest, [slot for slot, *_ in own])
        parts = []
        for plan in (reused(plan, self._used, most) for plan in plans):
            lanes = sorted(plan.lanes, key=lambda lane: own[lane[0]][0])  # by slot
            parts.append(
                PackedPart(
                    plan.bucket,
                    [[own[row][1:3] for row in lane] for lane in lanes],
                    [own[lane[0]][3] for lane in lanes],
                    self._scored,
                    [own[lane[0]][0] for lane in lanes],
                    [[own[row][4] for row in lane] for lane in lanes],
                )
            )
        return parts

    def size(self, part: PackedPart) -> int:
        """The size of a pass in rows: how many of the longest row have as many tokens."""
        return -(-part.bucket.tokens // self._largest)

    def seen(self, step: int) -> Seen:
        """The tokens of a round."""
        return Seen(tokens=sum(seat.rows.seen(step + seat.ahead).tokens for seat in self._seats.values()))

    def epoch(self, steps: int) -> float:
        """Epochs of the member that has done most."""
        return max(seat.rows.epoch(steps + seat.ahead) for seat in self._seats.values())

    def heaviest(self, steps: range, rows: int) -> PackedPart | None:
        """The largest pass that may occur: of the most tokens, full of rows as long as the longest."""
        slot = min(self._seats)
        bucket = lay_out([self._largest] * rows, rows * self._largest, self._largest)[0].bucket
        row = [0] * self._largest
        labels = row if self._scored == 1 else row[: int(self._largest * self._scored)]
        labels = [-100] * (self._largest - len(labels)) + labels
        count = bucket.lanes
        return PackedPart(bucket, [[(row, labels)]] * count, [1] * count, self._scored, [slot] * count)


class LossTogether(PackedLoss):
    """What `PackedLoss` computes, for every member by itself."""

    def __init__(self, spec: LlmTrialSpec, model: Any, slots: Slots, *, drops: bool = False) -> None:
        """Set up the loss.

        Args:
            spec: that of any member: they agree in the settings that are used here.
            model: the base of all members.
            slots: the adapters of the members.
            drops: whether any member's adapter has dropout.
        """
        super().__init__(spec, model)
        self._slots, self._drops = slots, drops
        self.members = len(slots)

    def inputs(self, part: PackedPart) -> Sequence[Tensor]:
        """The tensors of `PackedLoss`, and the slot of each lane int64, in the form that `Slots.begin` expects."""
        import torch

        lanes = part.lane_slots()
        in_order = lanes == list(range(len(self._slots)))
        return [*super().inputs(part), torch.tensor([] if in_order else lanes, dtype=torch.int64)]

    def loss(self, *inputs: Tensor) -> Tensor:
        """For each slot (slots,), the pass's share of the mean loss of its member's step [nats]."""
        import torch

        *tensors, lanes = inputs
        keys = tensors.pop() if self._drops else None
        ids, places = tensors[0], tensors[3]
        self._slots.begin(lanes, keys)
        shares = self._losses(*tensors)
        places_lane = places // ids.shape[1]
        members = lanes.index_select(0, places_lane) if len(lanes) else places_lane
        return torch.zeros(len(self._slots), device=shares.device).index_add(0, members, shares)
