"""How long a trial takes: measured on trials that finished, kept by device and shape, predicted for others.

A shape is what decides the time of a step but for the length of rows: the model, the method without its rates, the rows
of a step and of a pass, dtypes and recomputation. Seconds of a step are taken to grow with the tokens of a row.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from pydantic import Field, ValidationError

from ray_peft.foundation.cache import cache_folder
from ray_peft.foundation.strict import Strict
from ray_peft.foundation.whole import write_text
from ray_peft.methods.base import OF_TRAINING
from ray_peft.spec import TrialSpec
from ray_peft.tasks.base import Workload
from ray_peft.trial.result import TrialResult

Point: TypeAlias = tuple[int, float, Mapping[str, float]]
"""A line of metrics.jsonl: the optimizer step, seconds since the trial's first start, metrics."""

LENGTHS = (0.5, 2.0)
"""Rows of between so many times the measured tokens are predicted; others were not measured."""

FORWARD_SHARE = 1 / 3
"""Of a training pass, what the forward pass takes: the backward pass computes two products for each of its own. It
stands for the loss of held-out rows where only a training step was measured."""

_TRAIN = (
    "batch_size", "micro_batch_size", "gradient_checkpointing", "precision", "engine", "cuda_graphs", "loss",
    "ema_decay",
)  # fmt: skip
"""Settings of the training that change the time of a step; those of a method all do but `OF_TRAINING`."""


class Speed(Strict):
    """What was measured of one shape on one device."""

    step_s: float | None = None
    """Seconds of an optimizer step after the first; None of a trial without training."""
    row_tokens: float = Field(gt=0)
    """Mean tokens of a training row."""
    rest_s: float = Field(ge=0)
    """Seconds of a trial beside its steps and its scores: load, first step, save. The least that was measured: the
    first trial of a process imports its libraries, too."""
    scored_row_s: float | None = None
    """Seconds for the loss of a held-out row; None where it was not measured by itself."""
    answers_s: float | None = None
    """Seconds of `answered_rows` answers; None without answers."""
    answered_rows: int = 0
    new_tokens: int = 0
    """Most tokens of those answers."""
    answered_at_once: int = 1
    """Answers at a time."""
    timed: int = 0
    """Times between two logged losses behind `step_s`."""


def key(spec: TrialSpec, fingerprint: str | None, device: str) -> str:
    """The name under which the speed of a trial's shape is kept.

    Args:
        spec: the trial, with what `train.fit: auto` chose for it.
        fingerprint: of its model's content.
        device: the GPU's name, or the CPU's model and threads.
    """
    plain = spec.plain()
    model = {name: plain["model"][name] for name in ("dtype", "quantization", "attention")}
    train = {name: plain["train"].get(name) for name in _TRAIN}
    lengths = [plain["data"].get(name) for name in ("max_length", "resolution")]
    decides = [device, spec.resources.num_workers, fingerprint, model, _timed(plain["method"]), train, lengths]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:24]


def _timed(value: Any) -> Any:
    """The settings of a method without those that change no time."""
    if isinstance(value, dict):
        return {name: _timed(entry) for name, entry in value.items() if name not in OF_TRAINING}
    return [_timed(entry) for entry in value] if isinstance(value, list) else value


def measured(result: TrialResult, points: Sequence[Point], workload: Workload) -> Speed | None:
    """What a finished trial says of its shape; None if it went on from a checkpoint, or has too few steps.

    Args:
        result: the trial's row.
        points: what it logged, in order.
        workload: its data.
    """
    spec, usage = result.spec, result.usage
    if result.status != "finished" or result.resumed_from_step is not None or result.restarts or not usage.complete:
        return None
    answered = workload.answered_rows
    batch, new_tokens = (getattr(spec.evaluation, name, 1) for name in ("batch_size", "max_new_tokens"))
    settings: dict[str, Any] = {"row_tokens": workload.row_tokens}
    if answered:
        settings |= {"answered_rows": answered, "new_tokens": new_tokens, "answered_at_once": batch}
    if not result.steps:  # the untouched base: its losses and answers together
        scored = {"answers_s": usage.evaluate_s} if answered else {"scored_row_s": _each(usage.evaluate_s, workload)}
        return Speed(**settings, **scored, rest_s=max(0.0, usage.wall_time_s - usage.evaluate_s))
    times = _step_times(points, [steps for _, steps in spec.method.stages(result.steps)])
    if times is None:
        return None
    step_s, timed = times
    in_between = _evaluations(points, result.steps)
    scored_row_s = _each(median(in_between), workload) if in_between else None
    if scored_row_s is None and not answered:
        scored_row_s = _each(usage.evaluate_s, workload)
    if answered:
        of_loss = workload.scored_rows * (scored_row_s or step_s / spec.train.batch_size * FORWARD_SHARE)
        settings["answers_s"] = max(0.0, usage.evaluate_s - of_loss)
    rest = usage.wall_time_s - usage.evaluate_s - step_s * result.steps - sum(in_between)
    return Speed(**settings, step_s=step_s, scored_row_s=scored_row_s, rest_s=max(0.0, rest), timed=timed)


def _each(seconds: float, workload: Workload) -> float | None:
    return seconds / workload.scored_rows if workload.scored_rows else None


def _step_times(points: Sequence[Point], stages: Sequence[int]) -> tuple[float, int] | None:
    """Seconds of a step, the median of each stage weighed by its steps, and how many times are behind it."""
    ends = [sum(stages[: place + 1]) for place in range(len(stages))]
    seconds: list[list[float]] = [[] for _ in stages]
    for before, after in zip(points, points[1:], strict=False):
        if "train_loss" in after[2] and after[0] > before[0]:
            stage = next((place for place, end in enumerate(ends) if after[0] <= end), len(ends) - 1)
            seconds[stage].append((after[1] - before[1]) / (after[0] - before[0]))
    if not all(seconds):
        return None
    total = sum(steps * median(times) for steps, times in zip(stages, seconds, strict=True))
    return total / sum(stages), sum(map(len, seconds))


def _evaluations(points: Sequence[Point], steps: int) -> list[float]:
    """Seconds of each evaluation of the held-out loss while the trial trained."""
    return [
        after[1] - before[1]
        for before, after in zip(points, points[1:], strict=False)
        if "eval_loss" in after[2] and "train_loss" in before[2] and before[0] == after[0] < steps
    ]


def predicted(
    spec: TrialSpec, speed: Speed | None, workload: Workload | None, steps: int, *, on_gpu: bool
) -> dict[str, float]:
    """Seconds of a trial: step_s (not of the untouched base), evaluate_s and wall_time_s.

    Args:
        spec: the trial.
        speed: of its shape; None where it was not measured.
        workload: its data; None where it is not known.
        steps: its optimizer steps; 0 without training.
        on_gpu: whether it runs on one.

    Returns:
        Seconds by name; nothing where rows of that length, or answers, were not measured.
    """
    if speed is None or workload is None:
        return {}
    longer = workload.row_tokens / speed.row_tokens
    if not LENGTHS[0] <= longer <= LENGTHS[1] or (steps and speed.step_s is None):
        return {}
    step_s = (speed.step_s or 0.0) * longer
    evaluate_s = 0.0
    if speed.scored_row_s is not None:
        evaluate_s += workload.scored_rows * speed.scored_row_s * longer
    elif steps:
        evaluate_s += workload.scored_rows * step_s / spec.train.batch_size * FORWARD_SHARE
    elif not workload.answered_rows:
        return {}
    if workload.answered_rows:
        if speed.answers_s is None:
            return {}
        evaluate_s += speed.answers_s * _more_answers(spec, speed, workload, on_gpu=on_gpu)
    train = {"step_s": step_s} if steps else {}
    return {**train, "evaluate_s": evaluate_s, "wall_time_s": speed.rest_s + step_s * steps + evaluate_s}


def _more_answers(spec: TrialSpec, speed: Speed, workload: Workload, *, on_gpu: bool) -> float:
    """Times the measured answers: by their rows and tokens.

    Answers that are decoded side by side on a GPU take little more time than one, but so few were measured that the
    prediction stays above, and on a CPU it is right.
    """
    tokens = getattr(spec.evaluation, "max_new_tokens", 1) / max(1, speed.new_tokens)
    if not on_gpu:
        return tokens * workload.answered_rows / max(1, speed.answered_rows)
    rounds = max(1.0, workload.answered_rows / getattr(spec.evaluation, "batch_size", 1))
    return tokens * rounds / max(1.0, speed.answered_rows / speed.answered_at_once)


def read(name: str) -> Speed | None:
    """The kept speed of that key; None if there is none, or it cannot be read."""
    try:
        return Speed.model_validate_json((_folder() / f"{name}.json").read_bytes())
    except (OSError, ValidationError):
        return None


def remember(name: str, speed: Speed) -> None:
    """Keep a speed, unless one with more of both steps and answers is there; a full or read-only cache keeps none."""
    before = read(name)
    if before is not None:
        if speed.answers_s is None and before.answers_s is not None:
            answers = {"answers_s", "answered_rows", "new_tokens", "answered_at_once"}
            speed = speed.model_copy(update={field: getattr(before, field) for field in answers})
        if speed.timed < min(before.timed, ENOUGH_TIMES):
            of_steps = {"step_s", "row_tokens", "timed"}
            speed = speed.model_copy(update={field: getattr(before, field) for field in of_steps})
        speed = speed.model_copy(update={"rest_s": min(speed.rest_s, before.rest_s)})
    with contextlib.suppress(OSError):
        _folder().mkdir(parents=True, exist_ok=True)
        write_text(_folder() / f"{name}.json", speed.model_dump_json())


ENOUGH_TIMES = 5
"""Times between two logged losses from which on a newer speed takes the place of an older one."""


def _folder() -> Path:
    return cache_folder() / "speed"


def points_of(path: Path) -> list[Point]:
    """The lines of a metrics.jsonl; none if there is no such file."""
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [(line["step"], line["time_s"], line) for line in lines]
