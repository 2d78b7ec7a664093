"""Passes of static shape: lanes of several rows, attention inside each row, and the loss at the scored places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_peft.engine.contract import Computation, Rows, Seen, Share
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.data import IGNORED
from ray_peft.tasks.llm_sft.lanes import Bucket, largest_capacity, lay_out, reused
from ray_peft.tasks.llm_sft.masks import for_model, windows
from ray_peft.tasks.llm_sft.steps import TextPart, TextRows

if TYPE_CHECKING:
    from torch import Tensor

    from ray_peft.engine.row_dropout import RowDropout


@dataclass(frozen=True)
class PackedPart:
    """Rows of one pass, laid into its lanes."""

    bucket: Bucket
    lanes: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]]
    """(ids, labels) of the rows of each lane."""
    loss_tokens: Sequence[int]
    """For each lane, the tokens with loss in its member's whole step, over all workers: the divisor of the loss."""
    scored: float
    """Share of the places that are scored; all are if more than this share carries loss."""
    members: Sequence[int] = ()
    """The slot of each lane's member, if there are several members."""
    keys: Sequence[Sequence[int]] = ()
    """The key from which each row's dropout is drawn, by lane; empty without dropout."""

    def lane_slots(self) -> list[int]:
        """The slot of every lane; empty lanes belong to the first lane's."""
        return list(self.members) + [self.members[0]] * (self.bucket.lanes - len(self.members))

    def unpacked(self) -> TextPart:
        """The same rows, each by itself, as the only pass of their step."""
        ids, labels = zip(*(row for lane in self.lanes for row in lane), strict=True)
        return TextPart(ids, labels, self.loss_tokens[0], 1, [key for lane in self.keys for key in lane])


@dataclass(frozen=True)
class Laid:
    """Rows in the lanes of a bucket, (lanes, capacity) int64."""

    ids: Tensor
    positions: Tensor
    documents: Tensor
    """The number of the row in its lane, from 1; 0 means empty."""
    keys: Tensor | None
    """From which each token's dropout is drawn; None without dropout."""
    begins: list[list[int]]
    """Of each lane, the place in the flattened lanes where each row begins."""


def lay(bucket: Bucket, lanes: Sequence[Sequence[Sequence[int]]], keys: Sequence[Sequence[int]] | None) -> Laid:
    """Put rows one after the other into their lanes.

    Args:
        bucket: the static shape.
        lanes: the token ids of the rows of each lane.
        keys: from which the dropout of each row is drawn, by lane; empty for zeros, None without dropout.
    """
    import torch

    from ray_peft.engine.keyed_dropout import placed

    ids = torch.zeros(bucket.lanes, bucket.capacity, dtype=torch.int64)
    positions, documents, row_keys = torch.zeros_like(ids), torch.zeros_like(ids), torch.zeros_like(ids)
    begins: list[list[int]] = []
    for lane, rows in enumerate(lanes):
        begin = 0
        begins.append([])
        for number, row in enumerate(rows, start=1):
            end = begin + len(row)
            ids[lane, begin:end] = torch.tensor(row)
            positions[lane, begin:end] = torch.arange(len(row))
            documents[lane, begin:end] = number
            row_keys[lane, begin:end] = keys[lane][number - 1] if keys else 0
            begins[-1].append(lane * bucket.capacity + begin)
            begin = end
    return Laid(ids, positions, documents, None if keys is None else placed(row_keys, positions), begins)


class PackedRows(Rows[PackedPart]):
    """The rows of a trial's steps, in passes of few static shapes."""

    def __init__(self, rows: TextRows) -> None:
        """Measure the rows: the longest decides how many tokens a pass of a number of rows may hold."""
        self._rows = rows
        self._largest = largest_capacity(max(rows.lengths()))
        self._scored = rows.scored_share
        self._used: set[Bucket] = set()

    def parts(self, step: int, share: Share, rows: int) -> list[PackedPart]:
        """A worker's rows of a step, in passes of at most as many tokens as `rows` of the longest row."""
        own = [
            (ids, labels, key)
            for part in self._rows.parts(step, share, self._rows.micro_batch)
            for ids, labels, key in zip(part.ids, part.labels, part.keys, strict=True)
        ]
        loss_tokens, most = self._rows.loss_tokens(step), rows * self._largest
        plans = [reused(plan, self._used, most) for plan in lay_out([len(ids) for ids, *_ in own], most, self._largest)]
        return [
            PackedPart(
                plan.bucket,
                [[own[row][:2] for row in lane] for lane in plan.lanes],
                [loss_tokens] * len(plan.lanes),
                self._scored,
                keys=[[own[row][2] for row in lane] for lane in plan.lanes],
            )
            for plan in plans
        ]

    def size(self, part: PackedPart) -> int:
        """The size of a pass in rows: how many of the longest row have as many tokens."""
        return -(-part.bucket.tokens // self._largest)

    def seen(self, step: int) -> Seen:
        """The tokens of a step."""
        return self._rows.seen(step)

    def epoch(self, steps: int) -> float:
        """Epochs after `steps` steps."""
        return self._rows.epoch(steps)

    def heaviest(self, steps: range, rows: int) -> PackedPart | None:
        """The pass with the most tokens among those of `steps`."""
        lengths = self._rows.lengths()

        def tokens(step: int) -> int:
            own = [lengths[place] for place in self._rows.places(step)]
            return max(plan.bucket.tokens for plan in lay_out(own, rows * self._largest, self._largest))

        heaviest = max(steps, key=tokens)
        return max(self.parts(heaviest, Share(), rows), key=lambda part: part.bucket.tokens)


class PackedLoss(Computation[PackedPart]):
    """What `TextLoss` computes, on packed rows; the bucket decides the shape of every tensor."""

    keeps_gradients = True

    def __init__(self, spec: LlmTrialSpec, model: Any, dropout: RowDropout | None = None) -> None:
        """Set up the loss.

        Args:
            spec: decides the precision of matrix products.
            model: a causal language model, with or without PEFT's wrapper.
            dropout: draws the dropout of each row; None if the model has none, or if torch draws it.
        """
        from ray_peft.tasks.llm_sft.head import head_settings

        self._dropout, self._drops = dropout, dropout is not None
        self._model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._autocasts = spec.train.precision == "bf16"
        config = self._model.config.get_text_config()
        self._windows = windows(config)
        self._softcap, self._scale = head_settings(config)

    def inputs(self, part: PackedPart) -> Sequence[Tensor]:
        """The tensors of a pass.

        ids, positions and row numbers (lanes, capacity) int64, where row 0 means empty; then the scored places in the
        flattened lanes and their targets, (places,) int64, and weights (places,) float32. There are as many places as
        `scored` says, or one for every token. With dropout by the row, also the keys of tokens (lanes, capacity) int64.
        """
        import torch

        keys = part.keys if self._drops else None
        laid = lay(part.bucket, [[ids for ids, _ in rows] for rows in part.lanes], keys)
        places: list[int] = []
        targets: list[int] = []
        weights: list[float] = []
        for lane, (rows, begins) in enumerate(zip(part.lanes, laid.begins, strict=True)):
            for (_, labels), begin in zip(rows, begins, strict=True):
                scored = [place for place in range(1, len(labels)) if labels[place] != IGNORED]
                places += [begin + place - 1 for place in scored]
                targets += [labels[place] for place in scored]
                weights += [1 / max(part.loss_tokens[lane], 1)] * len(scored)
        fill = part.bucket.scored_places(part.scored, len(places)) - len(places)
        return [
            laid.ids,
            laid.positions,
            laid.documents,
            torch.tensor(places + [0] * fill),
            torch.tensor(targets + [0] * fill),
            torch.tensor(weights + [0.0] * fill),
            *([laid.keys] if laid.keys is not None else []),
        ]

    def loss(self, *inputs: Tensor) -> Tensor:
        """The pass's share of the step's mean loss [nats]."""
        return self._losses(*inputs).sum()

    def _losses(self, *inputs: Tensor) -> Tensor:
        """The contribution of each place (places,) to the loss of its step."""
        ids, positions, documents, places, targets, weights, *keys = inputs
        if self._dropout is not None:
            self._dropout.begin(keys[0], positions)
        shares: Tensor = self.log_probs(ids, positions, documents, places, targets) * -weights
        return shares

    def log_probs(self, ids: Tensor, positions: Tensor, documents: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities (places,) float32 of the targets; arguments are the first five tensors of `inputs`."""
        import torch

        from ray_peft.tasks.llm_sft.head import log_probs

        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self._autocasts):
            body = self._model.base_model(
                input_ids=ids, position_ids=positions, attention_mask=self._masks(documents), use_cache=False
            )
            hidden = body.last_hidden_state.flatten(0, 1).index_select(0, places)
            chosen = log_probs(self._model.get_output_embeddings(), hidden, targets, self._softcap, self._scale)
        return chosen.float()

    def _masks(self, documents: Tensor) -> Any:
        """Attention masks (lanes, 1, capacity, capacity): a token attends to earlier ones of its row and window.

        They have the form that the model expects.
        """
        import torch

        place = torch.arange(documents.shape[1], device=documents.device)
        distance = place[:, None] - place[None, :]
        same = documents[:, None, :, None] == documents[:, None, None, :]
        masks = {}
        for kind, window in self._windows.items():
            visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            masks[kind] = same & visible
        dtype = torch.bfloat16 if self._autocasts else self._model.dtype
        return for_model(masks, self._model.config.get_text_config(), dtype, autocasts=self._autocasts)
