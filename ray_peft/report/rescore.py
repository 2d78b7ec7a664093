"""Text scores of rows whose texts were cut otherwise than their references ask: computed again from their answers.

Rows of version 0.1.0 were cut as English whatever their script, and a worker without MeCab cuts Japanese otherwise than
one with it. A comparison must cut all alike.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

from ray_peft.metrics.scripts import Tokenizers, tokenizers
from ray_peft.report.uncertainty import Answers
from ray_peft.trial.result import TrialResult

logger = logging.getLogger(__name__)


def rescored(results: Sequence[TrialResult], answers: Answers) -> list[TrialResult]:
    """The results, with new text scores where the answers are on file and were not cut as they would be today."""
    tokenizers_for = cache(tokenizers)  # the trials of a sweep answer the same rows
    return [
        _rescored(result, *answers[result.trial_id], tokenizers_for) if result.trial_id in answers else result
        for result in results
    ]


def _rescored(
    result: TrialResult,
    predictions: Sequence[str],
    references: Sequence[str],
    tokenizers_for: Callable[[tuple[str, ...]], Tokenizers],
) -> TrialResult:
    scores = result.scores
    if scores.rouge_l is None or not references or len(predictions) != len(references):
        return result
    cut_with = Tokenizers(scores.bleu_tokenizer or "13a", scores.rouge_tokenizer or "rouge_score")
    if cut_with == tokenizers_for(tuple(references)):
        return result
    from ray_peft.tasks.llm_sft.scores import score_answers

    logger.info("%s: its text scores are computed again, since its answers were cut otherwise", result.trial_id)
    fresh = score_answers(predictions, references)
    update = {name: getattr(fresh, name) for name in ("bleu4", "rouge_l", "chrf", "bleu_tokenizer", "rouge_tokenizer")}
    return result.model_copy(update={"scores": scores.model_copy(update=update)})
