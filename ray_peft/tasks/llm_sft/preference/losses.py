"""The losses of DPO, ORPO and KTO, from the log-probabilities of whole answers: arithmetic only.

Equal to those of TRL 1.16 (DPOTrainer, ORPOTrainer, KTOTrainer), whose tests compare them; `label_smoothing` of the
sigmoid loss, which that DPOTrainer lacks, is the conservative DPO of E. Mitchell 2023 and of the DPO authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_peft.spec.preference import PreferenceSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Answers:
    """What a model says of the answers of some pairs or labelled rows: (row, side), side 0 the chosen or only one."""

    log_probs: Tensor
    """Sums over the answer's tokens, natural logarithms, float32."""
    reference: Tensor
    """The same of the model before training."""
    tokens: Tensor
    """Tokens of the answer, float32, at least 1."""

    @property
    def rises(self) -> Tensor:
        """By how much training raised the log-probabilities (row, side): rewards, but for the factor beta."""
        return self.log_probs - self.reference


def dpo(settings: PreferenceSpec, answers: Answers) -> Tensor:
    """The loss of each pair (pair,)."""
    import torch
    from torch.nn.functional import logsigmoid

    beta, smoothing = settings.beta, settings.label_smoothing
    if settings.loss == "ipo":
        means = answers.rises / answers.tokens
        return (means[:, 0] - means[:, 1] - 1 / (2 * beta)) ** 2
    logits = beta * (answers.rises[:, 0] - answers.rises[:, 1])
    if settings.loss == "hinge":
        return torch.relu(1 - logits)
    right, wrong = -logsigmoid(logits), -logsigmoid(-logits)
    if settings.loss == "robust":
        return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
    return (1 - smoothing) * right + smoothing * wrong


def odds_ratio(settings: PreferenceSpec, answers: Answers) -> Tensor:
    """ORPO's term of each pair (pair,), to which the mean loss of the chosen answers' tokens is added."""
    from torch.nn.functional import logsigmoid

    means = answers.log_probs / answers.tokens
    log_odds = means - _log1mexp(means)
    return -settings.beta * logsigmoid(log_odds[:, 0] - log_odds[:, 1])


def kto(settings: PreferenceSpec, answers: Answers, desirable: Tensor, divergence: Tensor) -> Tensor:
    """The loss of each labelled row (row,).

    Args:
        settings: beta and the weights of both kinds.
        answers: of one side.
        desirable: (row,) float32, 1 for a desirable answer and 0 for another.
        divergence: (), the estimate of the divergence from the model before training, at least 0.
    """
    import torch

    signs = 2 * desirable - 1
    gains = torch.sigmoid(settings.beta * signs * (answers.rises[:, 0] - divergence))
    weights = desirable * settings.desirable_weight + (1 - desirable) * settings.undesirable_weight
    return weights * (1 - gains)


def _log1mexp(log_probs: Tensor) -> Tensor:
    """log(1 - exp(x)) of x below 0, by the better conditioned of two forms (Maechler 2012)."""
    import torch

    near = log_probs > -math.log(2)
    # Each form gets a harmless number where the other one counts: a NaN there would reach the gradient.
    of_near = torch.log(-torch.expm1(torch.where(near, log_probs, -0.5)))
    of_far = torch.log1p(-torch.exp(torch.where(near, -1.0, log_probs)))
    return torch.where(near, of_near, of_far)
