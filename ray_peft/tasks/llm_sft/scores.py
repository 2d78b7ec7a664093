"""From what a model gave on held-out rows to scores: of its answers, and the loss of each row. It needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ray_peft.metrics import own_metrics
from ray_peft.metrics.chrf_scores import chrf
from ray_peft.metrics.scores import RowReward, Sample, Scores
from ray_peft.metrics.scripts import tokenizers
from ray_peft.metrics.short_answers import exact_match, token_f1
from ray_peft.metrics.text_scores import bleu4, rouge_l
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.base import Scored
from ray_peft.tasks.llm_sft.encode import tokens_with_loss

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


@dataclass(frozen=True)
class Outputs:
    """What a model gave on a trial's held-out rows."""

    log_probs: Tensor
    """Of all answers' tokens (answer tokens,), the longest row first."""
    general_loss: float | None = None
    """Mean loss of a fixed general text's tokens [nats]; None if it is not asked for."""
    answers: Sequence[str] = ()
    """To the rows that are answered, the first ones."""
    ended: Sequence[bool] = ()
    """Whether each answer ended by itself."""
    judgement: Mapping[str, Any] = field(default_factory=dict)
    """Scores of pairs or labelled rows, by name; empty without such rows."""
    rewards: Sequence[RowReward] = ()
    """What is behind them."""


def answered_rows(spec: LlmTrialSpec, held_out: Dataset) -> Dataset:
    """The held-out rows that a trial answers; none if it does not ask for answers."""
    count = len(held_out)
    return held_out.select(range(min(spec.evaluation.rows or count, count) if spec.evaluation.generate else 0))


def scored(spec: LlmTrialSpec, held_out: Dataset, outputs: Outputs) -> Scored:
    """Loss, scores of the answers, and what is behind them.

    Args:
        spec: the trial.
        held_out: the rows that it is scored on.
        outputs: what its model gave on them.
    """
    losses, tokens = row_losses(held_out, outputs.log_probs)
    loss = -float(outputs.log_probs.mean())
    scores = Scores(eval_loss=loss, eval_rows=len(held_out), general_loss=outputs.general_loss, **outputs.judgement)
    rewards = list(outputs.rewards)
    if not spec.evaluation.generate:
        return Scored(scores, losses=losses, loss_tokens=tokens, rewards=rewards)
    rows = answered_rows(spec, held_out)
    predictions, references = list(outputs.answers), list(rows["reference"])
    samples = [
        Sample(
            row=index,
            source_dataset=rows[index]["source_dataset"],
            prompt=rows[index]["prompt"],
            reference=references[index],
            answer=predictions[index],
        )
        for index in range(min(spec.evaluation.samples, len(rows)))
    ]
    own = {
        own_metrics.name_of(path): own_metrics.rows(path, predictions, references) for path in spec.evaluation.metrics
    }
    of_loss = {name: getattr(scores, name) for name in ("eval_loss", "eval_rows", "general_loss", *outputs.judgement)}
    more = {**of_loss, "own": {name: fmean(values) for name, values in own.items()}}
    return Scored(
        score_answers(predictions, references).model_copy(update=more),
        samples,
        answers=list(zip(predictions, references, strict=True)),
        prompts=list(rows["prompt"]),
        ended=list(outputs.ended),
        own=own,
        losses=losses,
        loss_tokens=tokens,
        rewards=rewards,
    )


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
    tokens = list(map(tokens_with_loss, rows["labels"]))
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    parts: Sequence[Tensor] = log_probs.split([tokens[row] for row in order])  # type: ignore[no-untyped-call]
    losses = {row: -float(part.mean()) if part.numel() else 0.0 for row, part in zip(order, parts, strict=True)}
    return [losses[row] for row in range(len(order))], tokens
