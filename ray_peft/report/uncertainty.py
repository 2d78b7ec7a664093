"""Whether a row's scores differ from its base by more than the choice of test rows explains."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ray_peft.metrics.chrf_scores import chrf_row_statistics
from ray_peft.metrics.intervals import (
    CONFIDENCE,
    DifferenceInterval,
    Numbers,
    bleu4_parts,
    chrf_parts,
    compare,
    mean_parts,
)
from ray_peft.metrics.scores import RowReward
from ray_peft.metrics.text_scores import bleu_row_statistics, rouge_l_rows
from ray_peft.report.table import Row

__all__ = [
    "CONFIDENCE", "Answers", "Intervals", "LossTokens", "Losses", "Rewards", "Statistics", "intervals",
    "loss_intervals",
]  # fmt: skip

logger = logging.getLogger(__name__)

Answers: TypeAlias = Mapping[str, tuple[list[str], list[str]]]
"""By trial id the predictions and the references, one each a held-out row."""

Losses: TypeAlias = Mapping[str, Sequence[float]]
"""By trial id the loss of every held-out row."""

LossTokens: TypeAlias = Mapping[str, Sequence[int]]
"""By trial id the answer tokens behind each loss, which are its weight; none where all rows weigh the same."""

Rewards: TypeAlias = Mapping[str, Sequence[RowReward]]
"""By trial id, what each judged held-out row says of the rewards."""


class Statistics:
    """What each answered or scored row adds to the scores, computed once a trial."""

    def __init__(
        self,
        answers: Answers,
        losses: Losses | None = None,
        loss_tokens: LossTokens | None = None,
        rewards: Rewards | None = None,
    ) -> None:
        self.losses = {trial_id: tuple(values) for trial_id, values in (losses or {}).items() if values}
        """The losses of the trials that have one for every held-out row."""
        self.loss_tokens = {trial_id: tuple(values) for trial_id, values in (loss_tokens or {}).items() if values}
        """The weights of those losses that have some."""
        self.rewards = {trial_id: tuple(values) for trial_id, values in (rewards or {}).items() if values}
        """Of the trials that were scored on judged rows, what each of these says."""
        self.answers = {trial_id: values for trial_id, values in answers.items() if _is_complete(trial_id, values)}
        self.bleu = cache(self._bleu)
        self.rouge = cache(self._rouge)
        self.chrf = cache(self._chrf)

    def __contains__(self, trial_id: str) -> bool:
        """Whether the trial has a prediction for every reference, and at least one."""
        return trial_id in self.answers

    def references(self, trial_id: str) -> tuple[str, ...]:
        """The held-out rows that the trial answered."""
        return tuple(self.answers[trial_id][1])

    def loss_parts(self, trial_id: str) -> Numbers:
        """What each row adds to the held-out loss."""
        return mean_parts(self.losses[trial_id], self.loss_tokens.get(trial_id))

    def right(self, trial_id: str) -> list[float]:
        """Of each judged row 1 where the better answer has the higher reward, 0 where not, 0.5 where they are equal."""
        return [entry.right for entry in self.rewards[trial_id]]

    def dpo_losses(self, trial_id: str) -> list[float]:
        """DPO's loss (Rafailov et al. 2023, equation 7) of each judged row, from its margin, whatever was trained."""
        return [float(np.logaddexp(0.0, -entry.margin)) for entry in self.rewards[trial_id]]

    def _bleu(self, trial_id: str) -> NDArray[np.int64]:
        return bleu_row_statistics(*self.answers[trial_id])

    def _rouge(self, trial_id: str) -> list[float]:
        return rouge_l_rows(*self.answers[trial_id])

    def _chrf(self, trial_id: str) -> NDArray[np.int64]:
        return chrf_row_statistics(*self.answers[trial_id])


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """A row's scores less those of its base; p-values are corrected for all rows that have a base."""

    bleu4: DifferenceInterval
    rouge_l: DifferenceInterval
    chrf: DifferenceInterval


def intervals(rows: Sequence[Row], statistics: Statistics) -> dict[str, Intervals]:
    """The intervals of every row that has a base and answers for both, by trial id.

    A row whose references are not those of its base is left out with a warning.
    """
    paired: dict[str, str] = {}
    for row in rows:
        if row.base is None or row.trial_id not in statistics or row.base.trial_id not in statistics:
            continue
        trial_id, base = row.trial_id, row.base.trial_id
        if statistics.references(trial_id) != statistics.references(base):
            logger.warning("%s: no interval: its references are not those of the base row %s", trial_id, base)
            continue
        paired[trial_id] = base
    bleu = _against_base(paired, lambda trial: bleu4_parts(statistics.bleu(trial)))
    rouge = _against_base(paired, lambda trial: mean_parts(statistics.rouge(trial)))
    chrf = _against_base(paired, lambda trial: chrf_parts(statistics.chrf(trial)))
    return {
        trial_id: Intervals(bleu4=bleu[trial_id], rouge_l=rouge[trial_id], chrf=chrf[trial_id]) for trial_id in paired
    }


def loss_intervals(rows: Sequence[Row], statistics: Statistics) -> dict[str, DifferenceInterval]:
    """Intervals of the held-out losses less those of the base, by trial id.

    A row with another number of losses than its base, or with other tokens behind them, is left out with a warning.
    """
    paired: dict[str, str] = {}
    for row in rows:
        losses = statistics.losses.get(row.trial_id)
        base = statistics.losses.get(row.base.trial_id) if row.base is not None else None
        if losses is None or base is None or row.base is None:
            continue
        if len(losses) != len(base):
            logger.warning("%s: no interval: %d losses, and %d of the base row", row.trial_id, len(losses), len(base))
            continue
        if statistics.loss_tokens.get(row.trial_id) != statistics.loss_tokens.get(row.base.trial_id):
            logger.warning("%s: no interval: its losses are of other tokens than those of the base row", row.trial_id)
            continue
        paired[row.trial_id] = row.base.trial_id
    return _against_base(paired, statistics.loss_parts)


def _against_base(paired: Mapping[str, str], parts: Callable[[str], Numbers]) -> dict[str, DifferenceInterval]:
    """By trial id the difference of each trial to its base."""
    computed = cache(parts)
    differences = compare([(computed(trial_id), computed(base)) for trial_id, base in paired.items()])
    return dict(zip(paired, differences, strict=True))


def _is_complete(trial_id: str, texts: tuple[list[str], list[str]]) -> bool:
    predictions, references = texts
    if references and len(predictions) == len(references):
        return True
    logger.warning("%s: no interval: %d predictions for %d references", trial_id, len(predictions), len(references))
    return False
