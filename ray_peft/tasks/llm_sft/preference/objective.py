"""From log-probabilities of tokens to the loss of a pass, alike for padded rows and for rows in lanes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray_peft.spec import LlmTrialSpec
from ray_peft.tasks.llm_sft.preference import losses
from ray_peft.tasks.llm_sft.preference.steps import Judged, Totals

if TYPE_CHECKING:
    from torch import Tensor

TOKENS, ROWS = 3, 4
"""How many tensors `Objective.tokens` and `Objective.rows` give."""


class Objective:
    """The loss of pairs or labelled rows; every tensor has a shape that does not depend on what they hold."""

    def __init__(self, spec: LlmTrialSpec) -> None:
        self._spec, self._settings = spec, spec.train.preference
        self._divergence: Tensor | None = None
        """Of kto: the mean over the rows of a step, as far as they were passed."""

    def tokens(self, judged: Sequence[Judged], totals: Totals, slots: int, width: int, count: int) -> list[Tensor]:
        """How the scored tokens of rows, side after side, become sums.

        Args:
            judged: at most `slots` of them.
            totals: of their step.
            slots: rows that the sums have place for.
            width: most tokens of a side.
            count: length of the tensors; those that are left over count nowhere.

        Returns:
            For each token its place in a table of all sides int64, whether it is the answer's float32, and its weight
            in the chosen answers' own loss float32.
        """
        import torch

        cells: list[int] = []
        in_answer: list[float] = []
        own_loss: list[float] = []
        for slot, row in enumerate(judged):
            for number, side in enumerate(row.sides):
                scored, begin = side.scored, (slot * len(row.sides) + number) * width
                cells += [begin + place for place in scored.places]
                in_answer += scored.in_answer
                own_loss += [scored.own_loss / max(totals.own_loss_tokens, 1)] * len(scored.places)
        fill = count - len(cells)
        spare = slots * len(judged[0].sides) * width
        return [
            torch.tensor(cells + [spare] * fill),
            torch.tensor(in_answer + [0.0] * fill),
            torch.tensor(own_loss + [0.0] * fill),
        ]

    def rows(self, judged: Sequence[Judged], totals: Totals, slots: int) -> list[Tensor]:
        """What the loss needs of rows, beside their tokens.

        Returns:
            Log-probabilities under the model before training and answer tokens (slot, side), weights in the step's loss
            (slot,), and whether the answer is desirable (slot,), all float32. Empty slots weigh nothing.
        """
        import torch

        sides, empty = len(judged[0].sides), slots - len(judged)
        answers = [[side.scored.answer_tokens for side in row.sides] for row in judged]
        return [
            torch.tensor([[side.reference for side in row.sides] for row in judged] + [[0.0] * sides] * empty),
            torch.tensor(answers + [[1] * sides] * empty, dtype=torch.float32),
            torch.tensor([1 / totals.judged] * len(judged) + [0.0] * empty),
            torch.tensor([float(row.desirable) for row in judged] + [1.0] * empty),
        ]

    def loss(self, log_probs: Tensor, width: int, token_tensors: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
        """The share of these rows in their step's loss.

        Args:
            log_probs: (token,) float32, of the scored tokens in the order of `token_tensors`.
            width: as for `tokens`, which gave `token_tensors`.
            token_tensors: places of the tokens, and how they count.
            rows: what `rows` gave.
        """
        answers = self._answers(log_probs, width, token_tensors, rows)
        *_, weights, desirable = rows
        if self._spec.train.objective == "orpo":
            return (losses.odds_ratio(self._settings, answers) * weights).sum() - (log_probs * token_tensors[2]).sum()
        if self._spec.train.objective == "kto":
            divergence = self._estimate(log_probs).clamp(min=0)
            return (losses.kto(self._settings, answers, desirable, divergence) * weights).sum()
        return (losses.dpo(self._settings, answers) * weights).sum()

    def estimate(
        self, log_probs: Tensor, width: int, token_tensors: Sequence[Tensor], rows: Sequence[Tensor], keep: Tensor
    ) -> Tensor:
        """Add to the estimate of kto's divergence what prompts with answers of other rows say of it.

        Args:
            log_probs: (token,) float32, as for `loss`.
            width: as for `loss`.
            token_tensors: as for `loss`.
            rows: as for `loss`.
            keep: () float32, 0 where the step's estimate begins and else 1.

        Returns:
            The loss (), which is 0.
        """
        answers = self._answers(log_probs, width, token_tensors, rows)
        self._estimate(log_probs).mul_(keep).add_((answers.rises[:, 0] * rows[2]).sum())
        return log_probs.new_zeros((), requires_grad=True)

    def _estimate(self, like: Tensor) -> Tensor:
        """One tensor for all passes: recorded ones read and write it where it lies."""
        if self._divergence is None:
            self._divergence = like.new_zeros(())
        return self._divergence

    def _answers(
        self, log_probs: Tensor, width: int, token_tensors: Sequence[Tensor], rows: Sequence[Tensor]
    ) -> losses.Answers:
        cells, in_answer, _ = token_tensors
        reference, tokens, weights, _ = rows
        # Each token has a cell of its own, so that the sums are added up in one order: a scatter-add has none on a GPU.
        table = log_probs.new_zeros(reference.numel() * width + 1).index_copy(0, cells, log_probs * in_answer)
        sums = table[:-1].view(*reference.shape, width).sum(-1)
        used = (weights > 0)[:, None]
        return losses.Answers(sums.where(used, sums - 1), reference, tokens)  # log(1 - exp(0)) is infinite
