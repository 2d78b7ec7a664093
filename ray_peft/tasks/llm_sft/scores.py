"""Scores of what a model answered, and the loss of each held-out row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray_peft.metrics.chrf_scores import chrf
from ray_peft.metrics.scores import Scores
from ray_peft.metrics.scripts import tokenizers
from ray_peft.metrics.short_answers import exact_match, token_f1
from ray_peft.metrics.text_scores import bleu4, rouge_l
from ray_peft.tasks.llm_sft.data import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


def score_answers(predictions: Sequence[str], references: Sequence[str]) -> Scores:
    """BLEU-4, ROUGE-L, chrF, exact match and F1 with the tokenisers of the references' script, which are named."""
    chosen = tokenizers(references)
    return Scores(
        bleu4=bleu4(predictions, references, chosen.bleu),
        rouge_l=rouge_l(predictions, references, chosen.rouge),
        chrf=chrf(predictions, references),
        exact_match=exact_match(predictions, references),
        token_f1=token_f1(predictions, references),
        bleu_tokenizer=chosen.bleu,
        rouge_tokenizer=chosen.rouge,
        generated_rows=len(references),
    )


def row_losses(rows: Dataset, log_probs: Tensor) -> tuple[list[float], list[int]]:
    """Each row's mean loss over its answer tokens [nats], 0 without any, and the number of these; in row order.

    Args:
        rows: with `input_ids` and `labels`.
        log_probs: (answer tokens,) of all of them, the longest row first, as `evaluate.token_log_probs` gives them.
    """
    lengths = [len(ids) for ids in rows["input_ids"]]
    # The first token of a row has no token before it that could predict it.
    tokens = [sum(label != IGNORED for label in labels[1:]) for labels in rows["labels"]]
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    parts: Sequence[Tensor] = log_probs.split([tokens[row] for row in order])  # type: ignore[no-untyped-call]
    losses = {row: -float(part.mean()) if part.numel() else 0.0 for row, part in zip(order, parts, strict=True)}
    return [losses[row] for row in range(len(order))], tokens
