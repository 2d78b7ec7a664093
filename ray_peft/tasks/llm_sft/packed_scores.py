"""Log-probabilities of held-out answers on a GPU: rows one after the other in lanes, as training passes them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ray_peft.engine.recovery import free_memory, is_out_of_memory
from ray_peft.engine.replays import Replays
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.data import IGNORED
from ray_peft.tasks.llm_sft.decodable import has_virtual_tokens
from ray_peft.tasks.llm_sft.lanes import Bucket, Pass, largest_capacity, lay_out, reused
from ray_peft.tasks.llm_sft.packed import PackedLoss, PackedPart

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

ROUNDING = {"fp32": 1e-5, "bf16": 2e-2}
"""Largest relative difference of a mean that is computed in another order."""

Row = tuple[Sequence[int], Sequence[int]]
"""Token ids, and labels as long, IGNORED where no loss is."""


class PackedScores:
    """Scores rows in passes of few static shapes, each recorded once."""

    def __init__(self, spec: LlmTrialSpec, model: PreTrainedModel, rows: Sequence[Row], replays: Replays) -> None:
        """Look at the rows that will be scored.

        Args:
            spec: the trial.
            model: in evaluation mode.
            rows: all of them.
            replays: how passes run.
        """
        self._computation, self._device, self._replays = PackedLoss(spec, model), model.device, replays
        self._largest = largest_capacity(max(len(ids) for ids, _ in rows))
        scored = sum(map(scored_tokens, rows))
        self._share = min(1.0, math.ceil(scored / max(sum(len(ids) for ids, _ in rows), 1) * 1.25 * 4) / 4)
        self._used: set[Bucket] = set()
        self._buffers: dict[Any, tuple[list[Tensor], Tensor]] = {}

    def first_pass(self, rows: Sequence[Row], tokens: int) -> Pass:
        """The pass of the first rows of `rows`, the longest first, that holds at most `tokens`, or one row."""
        lengths: list[int] = []
        for ids, _ in rows:
            if lengths and sum(lengths) + len(ids) > tokens:
                break
            lengths.append(len(ids))
        return reused(lay_out(lengths, tokens, self._largest)[0], self._used, tokens)

    def log_probs(self, part: Pass, rows: Sequence[Row]) -> list[Tensor]:
        """Of each row of a pass, the log-probabilities (answer tokens,) float32 on the device, lane by lane.

        Args:
            part: which of `rows` it holds, and where.
            rows: those that `part` counts.
        """
        import torch

        packed = PackedPart(
            part.bucket, [[rows[row] for row in lane] for lane in part.lanes], [1] * len(part.lanes), self._share
        )
        inputs = self._computation.inputs(packed)[:-1]
        key = tuple(tuple(value.shape) for value in inputs)
        if key not in self._buffers:
            static = [torch.empty_like(value, device=self._device) for value in inputs]
            self._buffers[key] = static, torch.empty(len(inputs[-1]), device=self._device)
        static, out = self._buffers[key]
        for buffer, value in zip(static, inputs, strict=True):
            buffer.copy_(value)
        self._replays(key, partial(self._score, static, out))
        counts = [scored_tokens(rows[row]) for lane in part.lanes for row in lane]
        scored = out[: sum(counts)].clone()
        parts: Sequence[Tensor] = scored.split(counts)  # type: ignore[no-untyped-call]
        return list(parts)

    def _score(self, static: Sequence[Tensor], out: Tensor) -> None:
        out.copy_(self._computation.log_probs(*static))


def scored_tokens(row: Row) -> int:
    """Tokens of a row that are scored: the first has none before it that could predict it."""
    return sum(label != IGNORED for label in row[1][1:])


def packs(spec: LlmTrialSpec, model: PreTrainedModel) -> bool:
    """Whether rows may lie one after the other in recorded passes."""
    config: Any = model.config.get_text_config()
    return (
        model.device.type == "cuda"
        and spec.train.cuda_graphs
        and config._attn_implementation in ("sdpa", "eager")
        and not has_virtual_tokens(model)
        and not getattr(model, "is_loaded_in_8bit", False)  # which waits for what it finds in a pass
        and not getattr(config, "router_aux_loss_coef", 0.0)  # experts take what their content decides
    )


def packed_log_probs(
    spec: LlmTrialSpec,
    model: PreTrainedModel,
    rows: Sequence[Row],
    tokens: int,
    usual: Callable[[Sequence[Row]], Tensor],
) -> tuple[list[Tensor] | None, int]:
    """Log-probabilities (answer tokens,) float32 of every row, and the tokens of a pass in the end.

    Where memory runs out, passes hold half as many tokens from there. None if rows one after the other are not what
    `usual` makes of them, which is seen in the first pass, and in the first with
    several rows a lane.

    Args:
        spec: the trial.
        model: in evaluation mode.
        rows: the longest first.
        tokens: most tokens of a pass; a row that has more passes alone.
        usual: log-probabilities of rows that are padded, the longest first.

    Raises:
        torch.OutOfMemoryError: a single row does not fit.
    """
    records = model.device.type == "cuda"
    scores = PackedScores(spec, model, rows, Replays(records=records))
    log_probs: dict[int, Tensor] = {}
    left = list(range(len(rows)))
    checked = 0
    while left:
        part = scores.first_pass([rows[row] for row in left], tokens)
        places = [left[row] for lane in part.lanes for row in lane]
        try:
            scored = scores.log_probs(part, [rows[row] for row in left])
            together, reason = max(map(len, part.lanes)), None
            if checked < min(together, 2):  # a row alone in its lane shows less than several do
                reason = _differs(spec, scored, usual([rows[row] for row in sorted(places)]))
                checked = together
        except Exception as error:  # of a model's own code
            if is_out_of_memory(error) and len(places) == 1:
                raise
            ran_out = is_out_of_memory(error)
            reason = f"its attention does not take them ({type(error).__name__})"
            if log_probs and not ran_out:
                raise
        else:
            ran_out = False
        if ran_out:
            del scores
            free_memory(str(model.device))
            tokens = sum(len(rows[row][0]) for row in places) // 2
            logger.warning("held-out rows ran out of memory; going on with %d tokens a pass", tokens)
            scores = PackedScores(spec, model, rows, Replays(records=records))
            continue
        if reason is not None:
            logger.info("%s: held-out rows are padded, not one after the other: %s", spec.trial_id, reason)
            return None, tokens
        log_probs |= dict(zip(places, scored, strict=True))
        left = [row for row in left if row not in log_probs]
    return [log_probs[row] for row in range(len(rows))], tokens


def _differs(spec: LlmTrialSpec, ours: Sequence[Tensor], usual: Tensor) -> str | None:
    """Why rows one after the other are not what padded rows are; None if they are."""
    import torch

    if not usual.numel():
        return None
    loss, padded = (-float(log_probs.double().mean()) for log_probs in (torch.cat(list(ours)), usual))
    if abs(loss - padded) <= ROUNDING[spec.train.precision] * max(abs(padded), 1e-3):
        return None
    return f"their loss would be {loss:.6g}, not {padded:.6g}"
