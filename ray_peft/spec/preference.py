"""What a trial learns from its rows: answers, which of two answers is better, or whether an answer is good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from ray_peft.foundation.strict import Strict

if TYPE_CHECKING:
    from ray_peft.spec.llm_sft import LlmTrialSpec

Objective = Literal["sft", "dpo", "orpo", "kto"]

PAIRED = "preference"
"""The recipe of rows with a chosen and a rejected answer."""
LABELLED = "labelled"
"""The recipe of rows with one answer and whether it is desirable."""

PAIRED_OBJECTIVES = ("dpo", "orpo")
"""The objectives of which a pass holds both answers of a pair."""

_SERVED: dict[str, tuple[str, ...]] = {"dpo": (PAIRED,), "orpo": (PAIRED,), "kto": (PAIRED, LABELLED)}
"""The recipes that an objective learns from; the objective sft has its own rule."""


class PreferenceSpec(Strict):
    """The loss of the objectives dpo, orpo and kto; the objective sft has none of these settings.

    Sources: DPO, Rafailov et al. 2023, arXiv:2305.18290; robust DPO, Chowdhury et al. 2024, arXiv:2403.00409; IPO, Azar
    et al. 2023, arXiv:2310.12036; hinge, Zhao et al. 2023, arXiv:2305.10425; ORPO, Hong et al. 2024, arXiv:2403.07691;
    KTO, Ethayarajh et al. 2024, arXiv:2402.01306.
    """

    beta: float = Field(default=0.1, gt=0)
    """dpo and kto: how strongly the model is held to what it was; ipo: the paper's tau. orpo: the weight of the odds
    ratio beside the loss of the chosen answer. Rewards are beta times a log-probability's rise in training."""
    loss: Literal["sigmoid", "robust", "ipo", "hinge"] = "sigmoid"
    """dpo: the function of the difference of the two rewards."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """dpo: the probability that a pair is the wrong way round. sigmoid mixes both ways by it; robust, whose expectation
    is that of right labels, subtracts the wrong one."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """kto: weight of a desirable answer's loss. The paper asks for weights that make both kinds about as heavy."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """kto: weight of an undesirable answer's loss."""


_OF: dict[str, frozenset[str]] = {
    "sft": frozenset(),
    "dpo": frozenset({"beta", "loss", "label_smoothing"}),
    "orpo": frozenset({"beta"}),
    "kto": frozenset({"beta", "desirable_weight", "undesirable_weight"}),
}
"""The settings of `train.preference` that each objective reads."""


def problems(spec: LlmTrialSpec) -> list[str]:
    """The rules of the objective that a trial breaks, one sentence each with the way out."""
    train = spec.train
    recipes = [source.recipe for source in spec.data.sources]
    broken = _row_problems(train.objective, recipes) + _setting_problems(train.objective, train.preference)
    if train.objective == "sft":
        return broken
    if train.engine == "trl":
        broken.append(
            f"train.engine: trl runs TRL's SFTTrainer, which has no objective {train.objective}; use train.engine: own"
        )
    if train.loss == "all" and train.objective != "orpo":
        broken.append(
            f"train.objective: {train.objective} compares answers, so that train.loss: all has no meaning; use "
            "train.loss: answers"
        )
    if spec.members() and LABELLED in recipes:
        broken.append(
            "method.members: an ensemble tunes its weights on all held-out answers, but those of recipe "
            f"{LABELLED} are not all good; use recipe {PAIRED}"
        )
    if train.objective == "kto" and spec.resources.num_workers > 1:
        broken.append(
            f"train.objective: kto needs all rows of a step in one process (found resources.num_workers: "
            f"{spec.resources.num_workers}); use num_workers: 1, or train.objective: dpo"
        )
    return broken


def _row_problems(objective: Objective, recipes: Sequence[str]) -> list[str]:
    served = _SERVED.get(objective)
    if served is None:
        if LABELLED not in recipes:
            return []
        return [
            f"train.objective: sft would train on undesirable answers of recipe {LABELLED}, too; use train.objective: "
            "kto, or a recipe whose answers are all good"
        ]
    other = next((recipe for recipe in recipes if recipe not in served), None)
    if other is not None:
        kinds = " or ".join(served)
        return [f"train.objective: {objective} needs recipe {kinds} (found {other}); use that, or train.objective: sft"]
    if len(set(recipes)) > 1:
        return [f"train.objective: {objective} needs one recipe in all sources (found {', '.join(recipes)})"]
    return []


def _setting_problems(objective: Objective, preference: PreferenceSpec) -> list[str]:
    changed = [name for name, value in preference.plain().items() if value != PreferenceSpec.model_fields[name].default]
    unread = [name for name in changed if name not in _OF[objective]]
    sentences = [
        f"train.preference.{name} is no setting of train.objective: {objective}; leave it out, or use train.objective: "
        + " or ".join(other for other, names in _OF.items() if name in names)
        for name in unread
    ]
    if not unread and preference.label_smoothing and preference.loss not in ("sigmoid", "robust"):
        sentences.append(
            f"train.preference.label_smoothing ({preference.label_smoothing:g}) is no setting of loss "
            f"{preference.loss}; use loss: sigmoid or robust, or label_smoothing: 0"
        )
    return sentences
