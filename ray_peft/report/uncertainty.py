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

Losses: TypeAlias = Mapping[str, Sequence[float]]
"""By trial id the loss of every held-out row."""

CONFIDENCE = 0.95


class Statistics:
    """What each answered or scored row adds to the scores, computed once a trial."""

    def __init__(self, answers: Answers, losses: Losses | None = None) -> None:
        self.losses = {trial_id: tuple(given) for trial_id, given in (losses or {}).items() if given}
        """The losses of the trials that have one for every held-out row."""
        self.answers = {trial_id: given for trial_id, given in answers.items() if _whole(trial_id, given)}
        self.bleu = cache(self._bleu)
        self.rouge = cache(self._rouge)

    def __contains__(self, trial_id: str) -> bool:
        """Whether the trial has a prediction for every reference, and at least one."""
        return trial_id in self.answers

    def references(self, trial_id: str) -> tuple[str, ...]:
        """The held-out rows that the trial answered."""
        return tuple(self.answers[trial_id][1])

    def _bleu(self, trial_id: str) -> NDArray[np.int64]:
        return bleu_row_statistics(*self.answers[trial_id])

    def _rouge(self, trial_id: str) -> list[float]:
        return rouge_l_rows(*self.answers[trial_id])


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Paired bootstrap intervals of a row's scores less those of its base."""

    bleu4: DifferenceInterval
    rouge_l: DifferenceInterval


def intervals(rows: Sequence[Row], statistics: Statistics) -> dict[str, Intervals]:
    """The intervals of every row that has a base and answers for both, by trial id.

    A row whose references are not those of its base is left out with a warning.
    """
    found = {}
    for row in rows:
        if row.base is None or row.trial_id not in statistics or row.base.trial_id not in statistics:
            continue
        own, base = row.trial_id, row.base.trial_id
        if statistics.references(own) != statistics.references(base):
            logger.warning("%s: no interval: its references are not those of the base row %s", own, base)
            continue
        found[own] = Intervals(
            bleu4=bleu4_difference(statistics.bleu(own), statistics.bleu(base), confidence=CONFIDENCE),
            rouge_l=mean_difference(statistics.rouge(own), statistics.rouge(base), confidence=CONFIDENCE),
        )
    return found


def loss_intervals(rows: Sequence[Row], statistics: Statistics) -> dict[str, DifferenceInterval]:
    """Paired bootstrap intervals of the held-out losses less those of the base, by trial id.

    A row with another number of losses than its base is left out with a warning.
    """
    found = {}
    for row in rows:
        own = statistics.losses.get(row.trial_id)
        base = statistics.losses.get(row.base.trial_id) if row.base is not None else None
        if own is None or base is None:
            continue
        if len(own) != len(base):
            logger.warning("%s: no interval: %d losses, and %d of the base row", row.trial_id, len(own), len(base))
            continue
        found[row.trial_id] = mean_difference(own, base, confidence=CONFIDENCE)
    return found


def _whole(trial_id: str, given: tuple[list[str], list[str]]) -> bool:
    predictions, references = given
    if references and len(predictions) == len(references):
        return True
    logger.warning("%s: no interval: %d predictions for %d references", trial_id, len(predictions), len(references))
    return False
