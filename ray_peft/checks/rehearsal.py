"""A trial's own code on shapes, before anything starts: what fails there would fail in every trial like it."""

from __future__ import annotations

import json
from collections.abc import Iterable

from ray_peft.errors import ModelError, RayPeftError, first_line
from ray_peft.methods.base import ENOUGH_STEPS
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.tasks.remembered import Mark
from ray_peft.vram import ATTACH, decides_memory, part_of
from ray_peft.vram.cards import ANY


def rehearse(trials: Iterable[TrialSpec]) -> list[str]:
    """Attach, train a step, score and decode on shapes, for each distinct model and method.

    Predictions of memory (ray_peft/vram/) run the same code, so a sweep on GPUs reuses them.

    Returns:
        A note on each model that cannot be tried on shapes.

    Raises:
        ModelError: a line for every model and method that fails.
    """
    tried: set[str] = set()
    problems: dict[str, None] = {}
    notes: dict[str, None] = {}
    for trial in trials:
        for single in trial.members() or [trial]:
            key = _what_is_tried(single)
            if key in tried:
                continue
            tried.add(key)
            problem, note = _remembered(single, key)
            problems |= dict.fromkeys(filter(None, [problem]))
            notes |= dict.fromkeys(filter(None, [note]))
    if problems:
        raise ModelError("\n".join(problems))
    return list(notes)


def _remembered(trial: TrialSpec, key: str) -> tuple[str | None, str | None]:
    """What `_tried` returns, now or in an earlier run on the same content; a problem is never remembered."""
    task = TASKS[trial.task]
    content = task.content(trial)
    mark = Mark("rehearsal", [key, content])
    known = mark.read() if content is not None else None
    if known is not None:
        return None, known["note"]
    problem, note = _tried(trial)
    if problem is None and content is not None and task.content(trial) == content:
        mark.write({"note": note})
    return problem, note


def _what_is_tried(trial: TrialSpec) -> str:
    """What decides whether a trial's code runs: not how long, how fast or on what it trains."""
    stages = [decides_memory(stage) for stage, _ in trial.method.stages(ENOUGH_STEPS)]
    train = [trial.train.precision, trial.train.gradient_checkpointing, trial.evaluation.plain().get("generate")]
    return json.dumps([trial.task, trial.model.plain(), stages, train], sort_keys=True, default=str)


def _tried(trial: TrialSpec) -> tuple[str | None, str | None]:
    """The problem of a trial that would fail, and a note on one that cannot be tried; None where there is none."""
    predictor = TASKS[trial.task].predictor(trial)
    if predictor is None:
        return None, None
    what = f"method {trial.method.name} on model {trial.model.name}"
    try:
        predictor(trial, ANY)
    except RayPeftError as error:
        return f"{what}: {error}", None
    except Exception as error:  # noqa: BLE001 - a model's or a library's code may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        part = part_of(error)
        if part is None or _of_shapes_alone(error) or (part != ATTACH and not _base_runs(trial)):
            note = f"{what} cannot be tried on shapes ({reason}), so its errors show only when it runs"
            return None, note
        return f"{what}: {part} fails: {reason}", None
    return None, None


def _of_shapes_alone(error: Exception) -> bool:
    """Whether the code asked for what only numbers have, or for an operation that shapes do not have."""
    return isinstance(error, NotImplementedError) or "meta" in str(error)


def _base_runs(trial: TrialSpec) -> bool:
    """Whether the untouched model can be tried on shapes at all."""
    predictor = TASKS[trial.task].predictor(trial)
    assert predictor is not None
    try:
        predictor(trial.changed({"method": {"name": "none"}}), ANY)
    except Exception:  # noqa: BLE001 - whatever it is, it is not the method's
        return False
    return True
