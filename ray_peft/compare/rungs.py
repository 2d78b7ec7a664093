"""The rungs of a comparison: search spaces for `ray-peft sweep`, each written from what the one before gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_peft.compare.budget import BASE, Plan
from ray_peft.compare.candidates import FACTORS, FACTORS_OF_PAIRS
from ray_peft.compare.measure import Measured
from ray_peft.compare.setup import short
from ray_peft.compare.space_text import written
from ray_peft.errors import SearchSpaceError
from ray_peft.foundation.whole import write_text
from ray_peft.methods.base import Method
from ray_peft.report.digits import counted, duration
from ray_peft.report.ties import MEASURES
from ray_peft.space import yaml_text
from ray_peft.spec import TrialSpec
from ray_peft.trial.result import TrialResult

SEARCH, LONGER, ANSWER = "1_search", "2_longer", "3_answer"

CHOOSING_SEED = 1
"""Of all trials by which settings are chosen; those of the answer have the seeds after it."""


def file_of(folder: Path, rung: str) -> Path:
    """The search space of a rung."""
    return folder / f"{rung}.yaml"


def write_search(folder: Path, measured: Measured, plan: Plan, hours: float) -> Path:
    """The search space of the first rung, with comments that say how it was found. Returns its file."""
    setup, look = measured.setup, measured.setup.look
    loss = MEASURES["preference_loss"] if look.judged else "the loss"
    factors = (FACTORS_OF_PAIRS if look.judged else FACTORS)[plan.rates]
    entries = [_over_rates([method.at(factor) for factor in factors]) for method in setup.methods]
    train = min(setup.most_train, plan.answer_steps * setup.batch_size)
    space = setup.space(
        rung="search",
        question=f"Which learning rate is best for each method on {short(setup.data)}?",
        methods=entries,
        steps=plan.search_steps,
        rows=(train, plan.validation_rows, plan.test_rows),
        evaluation={"split": "validation", "generate": False},
        seed=CHOOSING_SEED,
        log_every=max(1, min(10, plan.search_steps // 4)),
    )
    unusable = "".join(f"; {count} cannot be used ({why})" for why, count in look.unusable.items())
    share = "98" if setup.on_gpu else "90"
    comments = {
        "data": (
            f"{look.rows:,} rows in {setup.data}, recognised as recipe {look.recipe}{unusable}; {look.repeated:,} "
            "repeat others.\nTest and validation rows are drawn first; training rows that repeat them are replaced."
        ),
        "data.max_length": f"{share} % of the rows are no longer [tokens]; longer ones are not trained on.",
        "method": (
            f"{plan.rates} learning rates for each method, around its default. The same number for all: an equal "
            "tuning budget."
        ),
        "train": (
            f"{plan.search_steps} steps here{f', {plan.longer_steps} in {LONGER}' if plan.longer else ''}, "
            f"{plan.answer_steps} in {ANSWER}; what is changed here holds for all of them, but for steps, seeds and "
            "scored rows."
        ),
        "evaluation": (f"Rates are chosen by {loss} on validation rows. Test rows are scored in the last step alone."),
    }
    for place, method in enumerate(setup.methods):
        step_s = measured.speeds[method.name].step_s
        memory = measured.memory_gib.get(method.name)
        size = f", {memory:.2f} GiB predicted" if memory is not None else ""
        comments[f"method.{place}"] = f"{method.name}: {step_s:.3g} s a step measured{size}"
    for name, reason in measured.left_out.items():
        comments["method"] += f"\nLeft out: {name}: {reason}"
    text = written(space, _head(setup.model, setup.data, plan, hours, len(setup.methods)), comments)
    write_text(file_of(folder, SEARCH), text)
    return file_of(folder, SEARCH)


def _head(model: str, data: str, plan: Plan, hours: float, methods: int) -> str:
    return "\n".join(
        [
            f"Which method is best for {short(model)} on {short(data)}? The first step of `ray-peft compare`.",
            "You may edit this file: the same command goes on with it. `ray-peft sweep` runs it by itself.",
            *plan_lines(plan, methods),
            f"Predicted: {duration(plan.whole_s)} of {duration(3600 * hours)}.",
        ]
    )


def plan_lines(plan: Plan, methods: int) -> list[str]:
    """The rungs, a line each."""
    lines = [
        f"{SEARCH}: {counted(methods, 'method')} x {counted(plan.rates, 'learning rate')} x "
        f"{counted(plan.search_steps, 'step')}; the loss on {counted(plan.validation_rows, 'validation row')} chooses "
        f"({duration(plan.search_s)})"
    ]
    if plan.longer:
        lines.append(
            f"{LONGER}: the best {plan.longer} of each method x {counted(plan.longer_steps, 'step')}; the same rows "
            f"choose ({duration(plan.longer_s)})"
        )
    seeds = f"{plan.seeds} new seeds" if plan.seeds > 1 else "a new seed"
    lines.append(
        f"{ANSWER}: the best of each method x {seeds} x {counted(plan.answer_steps, 'step')}, and the untouched base; "
        f"{counted(plan.test_rows, 'test row')} that no choice has seen ({duration(plan.answer_s)})"
    )
    return lines


def _over_rates(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A method's entries of several rates as one entry of the grid, where it has one rate; else a grid of them."""
    if all("lr" in entry for entry in entries):
        return {**entries[0], "lr": {"grid": [entry["lr"] for entry in entries]}}
    return {"grid": list(entries)}


@dataclass(frozen=True)
class Chosen:
    """The settings of a method that go on."""

    trials: tuple[TrialSpec, ...]
    """The best first."""
    loss: float
    """Of the best, on the validation rows; of pairs, DPO's."""
    tried: tuple[float, float]
    """The least and the greatest rate that were tried."""

    @property
    def at_edge(self) -> bool:
        """Whether the best has the least or the greatest rate that was tried."""
        return self.tried[0] < self.tried[1] and rate_of(self.trials[0].method) in self.tried


def best(results: Sequence[TrialResult], most: int) -> dict[str, Chosen]:
    """The settings of each method with the lowest validation losses; a method of which no trial finished is left out.

    Args:
        results: the rows of a rung.
        most: settings of a method.
    """
    by_method: dict[str, list[TrialResult]] = {}
    for row in results:
        if row.spec.train.warm_start is None:  # one that the user has added is no trial of equal steps
            by_method.setdefault(row.spec.method.name, []).append(row)
    chosen = {}
    for name, rows in by_method.items():
        scored = [(choosing_loss(row), row) for row in rows if row.status == "finished"]
        ordered = sorted(((loss, row) for loss, row in scored if loss is not None), key=lambda pair: pair[0])
        if name == BASE or not ordered:
            continue
        rates = [rate_of(row.spec.method) for row in rows]
        trials = tuple(row.spec for _, row in ordered[:most])
        chosen[name] = Chosen(trials, ordered[0][0], (min(rates), max(rates)))
    return chosen


def choosing_loss(row: TrialResult) -> float | None:
    """By which settings of a method are chosen: the loss of answers; of trials that learned preferences, DPO's.

    Objectives that have no such loss are chosen by reward accuracy.
    """
    scores = row.scores
    if scores.reward_accuracy is None or getattr(row.spec.train, "objective", "sft") == "sft":
        return scores.eval_loss
    return scores.preference_loss if scores.preference_loss is not None else 1 - scores.reward_accuracy


def rate_of(method: Method) -> float:
    """The learning rate of a method's first stage."""
    return method.parts()[0][1].lr


def write_next(
    folder: Path, rung: str, chosen: Mapping[str, Chosen], *, steps: int, evaluation: Mapping[str, Any], seeds: int
) -> Path:
    """The search space of a later rung: that of the first with other methods, steps, rows and seeds.

    Args:
        folder: of the comparison.
        rung: the name of the new one.
        chosen: what goes on.
        steps: of a trial.
        evaluation: settings of the evaluation that are others.
        seeds: of each trial, after `CHOOSING_SEED`; 0 keeps that one.

    Returns:
        Its file.

    Raises:
        SearchSpaceError: the first file was changed so that its trials differ in more than their methods.
    """
    source = file_of(folder, SEARCH)
    plain = yaml_text.parse(yaml_text.read(source), str(source))
    trials = [trial for of_method in chosen.values() for trial in of_method.trials]
    _check_alike(trials, source)
    entries = [_entry(trial.method) for trial in trials]
    if rung == ANSWER:
        entries = [{"name": BASE}, *entries]
    plain["name"] = f"{plain.get('tracking', {}).get('experiment', 'compare')}, {rung[2:]}"
    plain["description"] = _QUESTIONS[rung]
    plain["method"] = {"grid": entries}
    plain["train"] = {**plain["train"], "steps": steps, "log_every": max(1, min(10, steps // 8))}
    plain["evaluation"] = {**plain.get("evaluation", {}), **evaluation}
    if seeds:
        numbers = [CHOOSING_SEED + place for place in range(1, seeds + 1)]
        plain["seed"] = {"grid": numbers} if seeds > 1 else numbers[0]
    head = f"Written by `ray-peft compare` from the results of the step before; {_QUESTIONS[rung]}"
    write_text(file_of(folder, rung), written(plain, head, {}))
    return file_of(folder, rung)


_QUESTIONS = {
    LONGER: "Which of the best learning rates of each method is best in longer trials?",
    ANSWER: "Which method is best at its chosen learning rate, on test rows that no choice has seen?",
}


def _check_alike(trials: Sequence[TrialSpec], source: Path) -> None:
    shared = [
        {name: part for name, part in trial.plain().items() if name not in ("method", "seed")} for trial in trials
    ]
    if any(part != shared[0] for part in shared):
        raise SearchSpaceError(
            f"{source}: its trials differ in more than method and seed, so the steps after it cannot be written; let "
            "compare vary methods alone, or run this file with `ray-peft sweep`"
        )


def _entry(method: Method) -> dict[str, Any]:
    """A method as JSON-like data without the settings that are defaults."""
    return {"name": method.name, **method.model_dump(mode="json", exclude_defaults=True), **_rates(method)}


def _rates(method: Method) -> dict[str, Any]:
    """Its rate, also where it is the default."""
    return {"lr": rate_of(method)} if "lr" in type(method).model_fields else {}


def train_all(folder: Path, trial: TrialSpec, *, epochs: float) -> Path:
    """A trial with the answer's settings on all rows but the test rows. Returns its file."""
    source = file_of(folder, ANSWER)
    plain = yaml_text.parse(yaml_text.read(source), str(source))
    plain["name"] = f"{plain.get('tracking', {}).get('experiment', 'compare')}, all rows"
    plain["description"] = "The answer of the comparison, trained on all rows but the test rows."
    plain["method"] = _entry(trial.method)
    plain["seed"] = CHOOSING_SEED
    for part in plain["data"]["sources"]:
        part.update(train=1.0, validation=0)  # test rows are drawn first, so they stay the same
    plain["train"] = {key: value for key, value in plain["train"].items() if key != "steps"} | {
        "epochs": epochs, "log_every": 10
    }  # fmt: skip
    path = folder / "train_all.yaml"
    write_text(path, written(plain, "The answer of `ray-peft compare`; `ray-peft run` trains it.", {}))
    return path
