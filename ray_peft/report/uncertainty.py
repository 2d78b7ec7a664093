"""Whether a row's scores differ from its base by more than the choice of test rows explains."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ray_peft.metrics.bootstrap import DifferenceInterval, bleu4_difference, mean_difference
from ray_peft.metrics.text_scores import bleu_row_statistics, rouge_l_rows
from ray_peft.report.table import Row

logger = logging.getLogger(__name__)

Answers: TypeAlias = Mapping[str, tuple[list[str], list[str]]]
"""By trial id the predictions and the references, one each a held-out row."""

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Paired bootstrap intervals of a row's scores less those of its base."""

    bleu4: DifferenceInterval
    rouge_l: DifferenceInterval


def intervals(rows: Sequence[Row], answers: Answers) -> dict[str, Intervals]:
    """The intervals of every row that has a base and answers for both, by trial id.

    A row whose references are not those of its base is left out with a warning.
    """

    @cache
    def bleu(trial_id: str) -> NDArray[np.int64]:
        return bleu_row_statistics(*answers[trial_id])

    @cache
    def rouge(trial_id: str) -> list[float]:
        return rouge_l_rows(*answers[trial_id])

    found = {}
    for row in rows:
        if row.base is None or not {row.trial_id, row.base.trial_id} <= set(answers):
            continue
        own, base = row.trial_id, row.base.trial_id
        if not _paired(own, base, answers):
            continue
        found[own] = Intervals(
            bleu4=bleu4_difference(bleu(own), bleu(base), confidence=CONFIDENCE),
            rouge_l=mean_difference(rouge(own), rouge(base), confidence=CONFIDENCE),
        )
    return found


def _paired(own: str, base: str, answers: Answers) -> bool:
    """Whether both answered the same rows, of which there is at least one."""
    for trial_id in (own, base):
        predictions, references = answers[trial_id]
        if not references or len(predictions) != len(references):
            logger.warning(
                "%s: no interval: %d predictions for %d references", trial_id, len(predictions), len(references)
            )
            return False
    if answers[own][1] != answers[base][1]:
        logger.warning("%s: no interval: its references are not those of the base row %s", own, base)
        return False
    return True
