"""What the model before training says of judged rows: one number a side, computed once and kept beside the rows.

The model before training is the reference of every method, so that no second copy of it is held while it trains: a
frozen base would need a pass more in every step, weights that are trained a copy. It is what was loaded, before
anything is attached: a resumed trial loads the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from typing import TYPE_CHECKING

from ray_peft.foundation.storage import error_line
from ray_peft.foundation.whole import write_text
from ray_peft.methods.base import ENOUGH_STEPS
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.content import prepared_folder
from ray_peft.tasks.llm_sft.preference.rows import are_judged, mismatched_rows, side, side_columns
from ray_peft.tasks.llm_sft.preference.steps import REFERENCE

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from ray_peft.tasks.llm_sft.data import PreparedData

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised when the numbers change, so that older ones are not used again."""


def with_reference(
    spec: LlmTrialSpec, model: PreTrainedModel, data: PreparedData, pad: int, lowered: dict[str, int]
) -> dict[str, Dataset]:
    """The rows that need a reference with the column REFERENCE, by split: for each row a number a side.

    Held-out rows that are judged need one, since rewards are differences to it; so do the training rows of dpo and kto.

    Args:
        spec: the trial.
        model: as it was loaded: nothing is attached or trained.
        data: its rows.
        pad: the padding token.
        lowered: `Bench.lowered`.
    """
    splits: dict[str, Dataset] = {spec.evaluation.split: data.held_out(spec.evaluation.split)}
    if spec.train.objective in ("dpo", "kto") and spec.method.stages(ENOUGH_STEPS):
        splits["train"] = data.train
    return {
        split: rows.add_column(REFERENCE, _kept(spec, model, data.key, split, rows, pad, lowered))
        for split, rows in splits.items()
        if are_judged(rows)
    }


def _numbers(
    spec: LlmTrialSpec, model: PreTrainedModel, split: str, rows: Dataset, pad: int, lowered: dict[str, int]
) -> list[list[float]]:
    """A number for each side of each row; for kto's training rows also one for the answer of the row before."""
    log_probs = side_log_probs(spec, model, rows, pad, lowered)
    if spec.train.objective != "kto" or split != "train":
        return log_probs
    others = side_log_probs(spec, model, mismatched_rows(rows), pad, lowered)
    return [own + other for own, other in zip(log_probs, others, strict=True)]


def side_log_probs(
    spec: LlmTrialSpec,
    model: PreTrainedModel,
    rows: Dataset,
    pad: int,
    lowered: dict[str, int],
    first: Tensor | None = None,
) -> list[list[float]]:
    """Log-probabilities of the answer of each side of each row, summed over its tokens, under the model as it is.

    Args:
        spec: the trial.
        model: in any mode.
        rows: with the columns of their sides.
        pad: the padding token.
        lowered: `Bench.lowered`.
        first: what `token_log_probs` gave for the first side; None computes it.
    """
    from ray_peft.tasks.llm_sft.evaluate import token_log_probs
    from ray_peft.tasks.llm_sft.scores import row_losses

    sides: list[list[float]] = []
    for columns in side_columns(rows):
        own = side(rows, columns)
        known = first if not sides else None
        log_probs = known if known is not None else token_log_probs(spec, model, own, pad, lowered)
        losses, tokens = row_losses(own, log_probs)
        sides.append([-loss * count for loss, count in zip(losses, tokens, strict=True)])
    return [list(values) for values in zip(*sides, strict=True)]


def _kept(
    spec: LlmTrialSpec,
    model: PreTrainedModel,
    data_key: str,
    split: str,
    rows: Dataset,
    pad: int,
    lowered: dict[str, int],
) -> list[list[float]]:
    """The numbers from the file beside the rows, or computed now and put there."""
    file = prepared_folder(spec.data, data_key) / f"reference-{split}-{_key(spec, model, rows)}.json"
    if file.is_file():
        stored: list[list[float]] = json.loads(file.read_text(encoding="utf-8"))
        return stored
    begun = time.perf_counter()
    log_probs = _numbers(spec, model, split, rows, pad, lowered)
    logger.info(
        "%s: the log-probabilities of %d %s rows under the model before training took %.1f s",
        spec.trial_id, len(rows), split, time.perf_counter() - begun,
    )  # fmt: skip
    try:
        write_text(file, json.dumps(log_probs))
    except OSError as error:  # of a cache that cannot be written: the next trial computes them again
        logger.warning("%s: %s", spec.trial_id, error_line(error, file.parent))
    return log_probs


def _key(spec: LlmTrialSpec, model: PreTrainedModel, rows: Dataset) -> str:
    """What decides the numbers beside the rows: the weights as they are held, and how they are computed with."""
    from ray_peft.tasks.llm_sft.model import fingerprint

    quantization = spec.quantization.plain() if spec.quantization is not None else None
    dtype = spec.method.weights_dtype(spec.model.dtype)
    decides = [FORMAT, fingerprint(spec.model), spec.model.plain(), quantization, dtype, spec.train.precision]
    more = [model.device.type, spec.train.cuda_graphs, len(rows), side_columns(rows), spec.train.objective == "kto"]
    return hashlib.sha256(json.dumps([decides, more], sort_keys=True, default=str).encode()).hexdigest()[:16]
