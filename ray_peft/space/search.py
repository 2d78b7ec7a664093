"""The `search` of a search space: how values are drawn, which trials end early, and why it does not fit the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ray_peft.foundation.strict import Strict
from ray_peft.methods.base import ENOUGH_STEPS
from ray_peft.spec import TrialSpec
from ray_peft.spec.preference import LABELLED, PAIRED

_OF_PAIRS = ("reward_accuracy", "reward_margin")
"""Scores that only rows with a judgement have."""


class SearchSpec(Strict):
    """How distributions are drawn, and which trials end early."""

    samples: int | None = Field(default=None, ge=1)
    """Trials drawn per cell of the grid, so that every method gets the same tuning budget; None where nothing is drawn.
    """
    algorithm: Literal["random", "optuna"] = "random"
    """`random` draws all trials beforehand; `optuna` (TPE) proposes each from the results so far."""
    metric: Literal["eval_loss", "bleu4", "rouge_l", "chrf", "reward_accuracy", "reward_margin"] = "eval_loss"
    """What `optuna` improves: the loss downwards, the scores upwards."""
    seed: int = Field(default=0, ge=0)
    journal: str | None = None
    """With `optuna`, the absolute path of a file on shared storage, through which several drivers, each with an `--out`
    of its own, search together; None keeps one in `--out`."""
    scheduler: Literal["asha", "median"] | None = None
    """Ends trials early by their held-out loss, each compared with those of the same method, model and data at the same
    step. `asha` keeps the best 1 / `reduction` at `grace_steps`, and at `reduction` times as many steps again and again
    (arXiv:1810.05934). `median` ends a trial whose lowest loss is above the median of the others' mean losses up to
    that step. None lets every trial run to its end."""
    grace_steps: int | None = Field(default=None, ge=1)
    """With `scheduler`, optimizer steps before which no trial ends; None is the first evaluation (`train.eval_every`).
    """
    reduction: int = Field(default=3, ge=2)
    """With `asha`, one trial of so many goes on."""

    @field_validator("journal")
    @classmethod
    def _check_journal(cls, journal: str | None) -> str | None:
        if journal is not None and not Path(journal).is_absolute():
            raise ValueError("must be an absolute path, on storage that all drivers share")
        return journal

    @model_validator(mode="after")
    def _check_algorithm(self) -> Self:
        if self.journal is not None and self.algorithm != "optuna":
            raise ValueError("journal needs algorithm: optuna; random draws depend on the seed alone")
        if self.samples is None and self.scheduler is None:
            raise ValueError("give samples, the number of trials to draw, or a scheduler, which ends trials early")
        if self.samples is None and self.algorithm == "optuna":
            raise ValueError("samples: missing; algorithm: optuna needs the number of trials to propose")
        if self.scheduler is None and self.grace_steps is not None:
            raise ValueError("grace_steps needs a scheduler: asha or median")
        if self.scheduler != "asha" and "reduction" in self.model_fields_set:
            raise ValueError("reduction needs scheduler: asha")
        return self


def search_problem(
    templates: list[dict[str, Any]], searched: list[dict[str, tuple[str, list[Any]]]], search: SearchSpec | None
) -> str | None:
    """Why `search` does not fit the distributions, or None.

    Args:
        templates: the grid's cells.
        searched: the distributions of each, by dotted key: a kind and its arguments.
        search: of the file.
    """
    drawn = next((key for places in searched for key in places), None)
    if search is None:
        return drawn and f"search: missing, but {drawn} is a distribution; add `search: {{samples: N}}`"
    if search.samples is None:
        return drawn and f"search.samples: missing, but {drawn} is a distribution; give the number of trials to draw"
    if drawn is None:
        return f"search: there is no distribution to search (found samples {search.samples})"
    if search.algorithm != "optuna":
        return None
    if len(templates) > 1:
        return (
            f"search.algorithm: optuna searches one space, but the grid has {len(templates)} cells; "
            "use random, or write {choice: [...]} in place of {grid: [...]}"
        )
    method = templates[0].get("method")
    choices = method.get("choice", [method]) if isinstance(method, dict) else []
    if any(isinstance(choice, dict) and choice.get("name") == "ensemble" for choice in choices):
        return (
            "search.algorithm: optuna proposes one trial at a time, but an ensemble is made of several; "
            "search the members first, then write the best ones into an ensemble"
        )
    return _metric_problem(templates[0], search.metric)


def _metric_problem(template: dict[str, Any], metric: str) -> str | None:
    """Why no trial has the score that Optuna is to improve, or None."""
    evaluation = template.get("evaluation")
    if metric != "eval_loss" and template.get("task") == "text_to_image":
        return f"search.metric: images have no text scores; use eval_loss (found {metric})"
    if metric in _OF_PAIRS:
        data = template.get("data")
        sources = data.get("sources", []) if isinstance(data, dict) else []
        recipes = [source.get("recipe") for source in sources if isinstance(source, dict)]
        if not set(recipes) & {PAIRED, LABELLED}:
            named = ", ".join(map(str, recipes)) or "none"
            return f"search.metric: {metric} needs rows of recipe {PAIRED} or {LABELLED} (found {named}); use eval_loss"
        return None
    if metric != "eval_loss" and isinstance(evaluation, dict) and evaluation.get("generate") is False:
        return f"search.metric: {metric} needs evaluation.generate: true (found false); or use eval_loss"
    return None


def scheduler_problem(search: SearchSpec, trials: Sequence[TrialSpec]) -> str | None:
    """Why no trial can end early by its held-out loss, or not fairly; None if all is well, or none is to."""
    if search.scheduler is None:
        return None
    rule = f"search.scheduler: {search.scheduler}"
    if any(trial.members() for trial in trials):
        return (
            f"{rule} may end a member of an ensemble, which needs all of them; search the members first, then write "
            "the best ones into an ensemble"
        )
    if any(trial.resources.num_workers > 1 for trial in trials):
        return (
            f"{rule} needs trials of one worker (found resources.num_workers above 1): those of several report their "
            "losses at their end"
        )
    blind = sum(trial.train.eval_every is None and bool(trial.method.stages(ENOUGH_STEPS)) for trial in trials)
    if blind:
        return (
            f"{rule} compares held-out losses while trials train, but train.eval_every is missing in {blind} of "
            f"{len(trials)} trials; set it, such as to a tenth of the steps"
        )
    seeds: dict[str, set[int]] = {}
    for trial in trials:
        seeds.setdefault(json.dumps({**trial.plain(), "seed": None}, sort_keys=True), set()).add(trial.seed)
    if any(len(of_setting) > 1 for of_setting in seeds.values()):
        return (
            f"{rule} would end the worse of a setting's seeds, and the mean of the others would be too good; search "
            "with one seed, then run the best settings with several"
        )
    return None
