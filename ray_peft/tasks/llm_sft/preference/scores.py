"""How a model that was trained judges held-out rows, against what it was before."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ray_peft.metrics.scores import RowReward
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.encode import tokens_with_loss
from ray_peft.tasks.llm_sft.preference import losses
from ray_peft.tasks.llm_sft.preference.rows import side_columns
from ray_peft.tasks.llm_sft.preference.steps import REFERENCE

if TYPE_CHECKING:
    from datasets import Dataset


def rewards(spec: LlmTrialSpec, rows: Dataset, log_probs: Sequence[Sequence[float]]) -> list[RowReward]:
    """The rewards of judged rows.

    Args:
        spec: decides the factor beta.
        rows: with REFERENCE, and `desirable` if they are labelled.
        log_probs: of each side of each row under the trained model.
    """
    beta = spec.train.preference.beta
    signs = [1 if desirable else -1 for desirable in rows["desirable"]] if "desirable" in rows.column_names else None
    entries = []
    for row, (now, before) in enumerate(zip(log_probs, rows[REFERENCE], strict=True)):
        side_rewards = [beta * (after - reference) for after, reference in zip(now, before, strict=False)]
        margin = side_rewards[0] - side_rewards[1] if signs is None else signs[row] * side_rewards[0]
        entries.append(RowReward(row=row, margin=margin))
    return entries


def summary(
    spec: LlmTrialSpec, rows: Dataset, log_probs: Sequence[Sequence[float]], entries: Sequence[RowReward]
) -> dict[str, Any]:
    """The fields of `Scores` that speak of judged rows; `entries` are the rewards of the same rows."""
    values: dict[str, Any] = {
        "reward_accuracy": fmean(entry.right for entry in entries),
        "reward_margin": fmean(entry.margin for entry in entries),
    }
    if spec.train.objective == "dpo":
        values["preference_loss"] = _dpo_loss(spec, rows, log_probs)
    return values


def _dpo_loss(spec: LlmTrialSpec, rows: Dataset, log_probs: Sequence[Sequence[float]]) -> float:
    import torch

    sides = [map(tokens_with_loss, rows[labels]) for _, labels in side_columns(rows)]
    tokens = list(zip(*sides, strict=True))
    answers = losses.Answers(
        torch.tensor(log_probs, dtype=torch.float64),
        torch.tensor(rows[REFERENCE], dtype=torch.float64),
        torch.tensor(tokens, dtype=torch.float64).clamp(min=1),
    )
    return float(losses.dpo(spec.train.preference, answers).mean())
