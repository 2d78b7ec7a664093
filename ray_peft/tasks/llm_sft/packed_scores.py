"""Log-probabilities of held-out answers on a GPU, with rows packed into lanes as in training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ray_peft.engine.recovery import free_memory, is_out_of_memory
from ray_peft.engine.replays import Replays
from ray_peft.engine.shards import is_sharded
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.decodable import never_recorded
from ray_peft.tasks.llm_sft.encode import tokens_with_loss
from ray_peft.tasks.llm_sft.lanes import Bucket, Pass, largest_capacity, lay_out, reused, scored_share
from ray_peft.tasks.llm_sft.packed import PackedLoss, PackedPart

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ray_peft.engine.slots import Slots

logger = logging.getLogger(__name__)

ROUNDING = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest allowed relative difference between the two means, which are summed in another order."""

_TARGETS, _LANES = 4, 5
"""Places of two of a pass's tensors: the targets, and after them the slot of each lane."""


class Row(NamedTuple):
    """A held-out row."""

    ids: Sequence[int]
    labels: Sequence[int]
    """As many as `ids`, IGNORED for tokens without loss."""
    slot: int = 0
    """The slot of its trial's adapter, where trials of one base are scored together."""


class PackedScores:
    """Scores rows in passes of few static shapes, each recorded once."""

    def __init__(
        self,
        spec: LlmTrialSpec,
        model: PreTrainedModel,
        rows: Sequence[Row],
        replays: Replays,
        slots: Slots | None = None,
    ) -> None:
        """Measure the rows that will be scored.

        Args:
            spec: the trial; of several, any.
            model: in evaluation mode.
            rows: all rows that will be scored.
            replays: records the passes and replays them.
            slots: the adapters of several trials.
        """
        self._computation, self._device, self._replays = PackedLoss(spec, model), model.device, replays
        self._slots = slots
        self._largest = largest_capacity(max(len(row.ids) for row in rows))
        scored = sum(tokens_with_loss(row.labels) for row in rows)
        self._share = scored_share(scored, sum(len(row.ids) for row in rows))
        self._used: set[Bucket] = set()
        self._buffers: dict[Any, tuple[list[Tensor], Tensor]] = {}

    def first_pass(self, rows: Sequence[Row], tokens: int) -> Pass:
        """The pass of the first of `rows`, which begin with the longest: at most `tokens` tokens, or one row."""
        lengths: list[int] = []
        for row in rows:
            if lengths and sum(lengths) + len(row.ids) > tokens:
                break
            lengths.append(len(row.ids))
        owners = [row.slot for row in rows[: len(lengths)]]
        return reused(lay_out(lengths, tokens, self._largest, owners)[0], self._used, tokens)

    def log_probs(self, part: Pass, rows: Sequence[Row]) -> list[Tensor]:
        """Log-probabilities (answer tokens,) float32, on the device, of each row of a pass, lane by lane.

        Args:
            part: the pass.
            rows: those to which its indices refer.
        """
        import torch

        packed = PackedPart(
            part.bucket,
            [[rows[row][:2] for row in lane] for lane in part.lanes],
            [1] * len(part.lanes),
            self._share,
            [rows[lane[0]].slot for lane in part.lanes],
        )
        inputs = list(self._computation.inputs(packed)[:-1])
        if self._slots is not None:
            inputs.append(torch.tensor(packed.lane_slots()))
        key = tuple(tuple(value.shape) for value in inputs)
        if key not in self._buffers:
            static = [torch.empty_like(value, device=self._device) for value in inputs]
            self._buffers[key] = static, torch.empty(len(inputs[_TARGETS]), device=self._device)
        static, out = self._buffers[key]
        for buffer, value in zip(static, inputs, strict=True):
            buffer.copy_(value)
        self._replays(key, partial(self._score, static, out))
        counts = [tokens_with_loss(rows[row].labels) for lane in part.lanes for row in lane]
        scored = out[: sum(counts)].clone()
        parts: Sequence[Tensor] = scored.split(counts)  # type: ignore[no-untyped-call]
        return list(parts)

    def _score(self, static: Sequence[Tensor], out: Tensor) -> None:
        if self._slots is not None:
            self._slots.begin(static[_LANES])
        out.copy_(self._computation.log_probs(*static[:_LANES]))


def packs(spec: LlmTrialSpec, model: PreTrainedModel) -> bool:
    """Whether held-out rows may be packed into recorded passes."""
    config: Any = model.config.get_text_config()
    return (
        model.device.type == "cuda"
        and spec.train.cuda_graphs
        and not is_sharded(model)
        and config._attn_implementation in ("sdpa", "eager")
        and never_recorded(model) is None
        and not getattr(config, "router_aux_loss_coef", 0.0)  # in a mixture of experts, content decides the path
    )


def packed_log_probs(
    spec: LlmTrialSpec,
    model: PreTrainedModel,
    rows: Sequence[Row],
    tokens: int,
    padded_pass: Callable[[Sequence[Row]], Tensor] | None,
    slots: Slots | None = None,
) -> tuple[list[Tensor] | None, int]:
    """Log-probabilities (answer tokens,) float32 of every row, and the tokens of a pass at the end.

    If memory runs out, later passes hold half as many tokens. None if packed rows give other numbers than padded ones.
    This is checked in the first pass, and in the first pass with several rows in a lane.

    Args:
        spec: the trial.
        model: in evaluation mode.
        rows: the longest first.
        tokens: most tokens of a pass; a longer row is passed alone.
        padded_pass: returns the log-probabilities of padded rows, which begin with the longest; None where it is known
            that packed rows give the same.
        slots: the adapters of several trials.

    Raises:
        torch.OutOfMemoryError: a single row does not fit.
    """
    records = model.device.type == "cuda"
    scores = PackedScores(spec, model, rows, Replays(records=records), slots)
    log_probs: dict[int, Tensor] = {}
    remaining = list(range(len(rows)))
    checked = 0
    while remaining:
        part = scores.first_pass([rows[row] for row in remaining], tokens)
        places = [remaining[row] for lane in part.lanes for row in lane]
        try:
            scored = scores.log_probs(part, [rows[row] for row in remaining])
            rows_of_lane, reason = max(map(len, part.lanes)), None
            if padded_pass is not None and checked < min(
                rows_of_lane, 2
            ):  # several rows in a lane can go wrong where one cannot
                reason = _differs(spec, scored, padded_pass([rows[row] for row in sorted(places)]))
                checked = rows_of_lane
        except Exception as error:  # of a model's own code
            if is_out_of_memory(error) and len(places) == 1:
                raise
            ran_out = is_out_of_memory(error)
            reason = f"the model cannot compute several rows in one lane ({type(error).__name__})"
            if log_probs and not ran_out:
                raise
        else:
            ran_out = False
        if ran_out:
            del scores
            free_memory(str(model.device))
            tokens = sum(len(rows[row].ids) for row in places) // 2
            logger.warning("held-out rows ran out of memory; going on with %d tokens a pass", tokens)
            scores = PackedScores(spec, model, rows, Replays(records=records), slots)
            continue
        if reason is not None:
            logger.info("%s: held-out rows are padded, not packed: %s", spec.trial_id, reason)
            return None, tokens
        log_probs |= dict(zip(places, scored, strict=True))
        remaining = [row for row in remaining if row not in log_probs]
    return [log_probs[row] for row in range(len(rows))], tokens


def _differs(spec: LlmTrialSpec, packed: Sequence[Tensor], padded: Tensor) -> str | None:
    """How the loss of packed rows differs from that of padded rows; None if it does not."""
    import torch

    if not padded.numel():
        return None
    loss, padded_loss = (-float(log_probs.double().mean()) for log_probs in (torch.cat(list(packed)), padded))
    if abs(loss - padded_loss) <= ROUNDING[spec.train.precision] * max(abs(padded_loss), 1e-3):
        return None
    return f"their loss would be {loss:.6g}, not {padded_loss:.6g}"
