"""A pass of pairs, or labelled rows, each side in a row of its own, padded to the longest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray_peft.engine.contract import Computation
from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.encode import IGNORED
from ray_peft.tasks.llm_sft.loss import TextLoss
from ray_peft.tasks.llm_sft.preference.objective import ROWS, TOKENS, Objective
from ray_peft.tasks.llm_sft.preference.steps import PreferencePart
from ray_peft.tasks.llm_sft.steps import TextPart

if TYPE_CHECKING:
    from torch import Tensor

    from ray_peft.engine.row_dropout import RowDropout


TEXT = 5
"""How many tensors `TextLoss` takes, without dropout."""


class PreferenceLoss(Computation[PreferencePart]):
    """The loss of a pass, as its share of the mean over the pairs, or labelled rows, of the step."""

    def __init__(self, spec: LlmTrialSpec, model: Any, pad: int, dropout: RowDropout | None = None) -> None:
        """Set up the loss; arguments are those of `TextLoss`."""
        self._objective = Objective(spec)
        self._text = TextLoss(spec, model, pad, dropout)
        self._count = TOKENS + ROWS + TEXT + (dropout is not None)
        """Tensors of a pass that is trained on; one that is not has one more."""

    @property
    def balances(self) -> bool:
        """True for a mixture of experts with a balancing loss."""
        return self._text.balances

    def inputs(self, part: PreferencePart) -> Sequence[Tensor]:
        """The tensors of `Objective.tokens` and `Objective.rows`, then those of `TextLoss`.

        For a pass that is not trained on, also whether the estimate goes on, () float32.
        """
        import torch

        ids, labels, keys = [], [], []
        for row in part.judged:
            for side in row.sides:
                scored = set(side.scored.places)
                ids.append(side.ids)
                labels.append([token if place in scored else IGNORED for place, token in enumerate(side.ids)])
                keys.append(side.key)
        count, width = sum(label != IGNORED for row in labels for label in row), max(map(len, ids))
        text = TextPart(ids, labels, part.totals.judged, part.totals.passes, keys)
        return [
            *self._objective.tokens(part.judged, part.totals, len(part.judged), width, count),
            *self._objective.rows(part.judged, part.totals, len(part.judged)),
            *self._text.inputs(text),
            *([torch.tensor(0.0 if part.begins else 1.0)] if part.divergence else []),
        ]

    def compared(self, *inputs: Tensor) -> Tensor:
        """Log-probability () of all scored tokens of a pass.

        The loss has the difference of two, which is small at first, so that rounding is large beside it.
        """
        return self._log_probs(inputs)[0].sum()

    def _log_probs(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of the scored tokens (token,) float32, and the balancing loss of a mixture of experts."""
        log_probs, places, balance = self._text.log_probs(*inputs[TOKENS + ROWS : self._count])
        return (log_probs if places is None else log_probs[places]).float(), balance

    def loss(self, *inputs: Tensor) -> Tensor:
        """The pass's share of the step's loss."""
        import torch

        tokens, rows = inputs[:TOKENS], inputs[TOKENS : TOKENS + ROWS]
        width = inputs[TOKENS + ROWS].shape[1]
        with torch.set_grad_enabled(len(inputs) == self._count):
            chosen, balance = self._log_probs(inputs)
        if len(inputs) > self._count:
            return self._objective.estimate(chosen, width, tokens, rows, inputs[-1])
        loss = self._objective.loss(chosen, width, tokens, rows)
        return loss if balance is None else loss + balance
