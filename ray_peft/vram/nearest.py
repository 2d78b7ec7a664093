"""Settings for the memory at hand: what to change where a trial does not fit, and what `train.fit: auto` chooses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray_peft.errors import RayPeftError
from ray_peft.foundation import dotted
from ray_peft.foundation.units import GIB
from ray_peft.methods.adapter import Adapter
from ray_peft.methods.lora import LoRA, LowRankAdapter
from ray_peft.methods.qlora import QLoRA
from ray_peft.spec import TrialSpec
from ray_peft.spec.keys import CHECKPOINTING, MICRO_BATCH, STRATEGY
from ray_peft.vram.predict import Prediction


@dataclass(frozen=True)
class Suggestion:
    """One change to a trial."""

    changes: dict[str, Any]
    """Settings by their key in a search space; what a `--set` takes."""
    spec: TrialSpec
    predicted: Prediction
    fits: bool
    same_training: bool
    """True if the mathematics stays: the same rows, the same effective batch, the same method."""

    def line(self) -> str:
        """For people."""
        verdict = "fits" if self.fits else "does not fit"
        return f"{settings_text(self.changes)} ({self.predicted.peak_allocated / GIB:.2f} GiB, {verdict})"


WORTH_CHECKPOINTING = 4
"""Where the host takes most of a pass's time, `fit: auto` turns checkpointing on if it allows this many times the rows
of a pass."""
RECOMPUTED = 1.45
"""The time of a recorded pass with checkpointing, as a multiple of that without (Gemma-3-1B, H100: 1.48)."""


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings by key, for people, as YAML writes them."""
    return ", ".join(f"{key}: {_text(value)}" for key, value in settings.items())


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + settings_text(value) + "}"
    return json.dumps(value) if isinstance(value, bool | int | float) or value is None else str(value)


def nearest(
    spec: TrialSpec, predict: Callable[[TrialSpec], Prediction | None], fits: Callable[[Prediction], bool]
) -> list[Suggestion]:
    """Changes to a trial that does not fit, those that fit first, in order of how little they change.

    Micro-batch and checkpointing come first since they change time alone; only if no combination of them fits, the
    weights are spread over the workers that there are, and what changes the training is tried with the least of both:
    the optimizer's storage, the method, the length of rows.

    Args:
        spec: the trial.
        predict: the peak of a variant; None for one that cannot be built.
        fits: whether a peak fits.
    """
    suggestions: list[Suggestion] = []

    def tried(changes: dict[str, Any], *, same: bool) -> bool:
        """Whether these changes are allowed and fit."""
        variant = _changed(spec, changes)
        prediction = predict(variant) if variant is not None else None
        if variant is None or prediction is None:
            return False
        suggestions.append(Suggestion(changes, variant, prediction, fits(prediction), same))
        return suggestions[-1].fits

    for also in _checkpointing(spec):
        if also and tried(also, same=True):
            break
        if _largest(_smaller(spec), lambda size, also=also: tried({MICRO_BATCH: size, **also}, same=True)) is not None:  # type: ignore[misc]
            break
    if not any(suggestion.fits for suggestion in suggestions):
        for changes in _other_training(spec):
            tried(changes, same=STRATEGY in changes)
        for length in _shorter(spec):
            if tried({"data.max_length": length, **_least(spec)}, same=False):
                break
    return sorted(suggestions, key=_order)


def choose(
    spec: TrialSpec, predict: Callable[[TrialSpec], Prediction], fits: Callable[[Prediction], bool]
) -> dict[str, int | bool]:
    """What `train.fit: auto` means for a memory: rows per pass and checkpointing, by their keys.

    Of the largest pass that fits with checkpointing, and the largest without, the one whose step takes less time;
    where nothing fits, the least.

    Args:
        spec: the trial.
        predict: the peak of a variant.
        fits: whether a peak fits.
    """

    def variant(size: int, checkpointing: bool) -> TrialSpec | None:
        try:
            return spec.changed({MICRO_BATCH: size, CHECKPOINTING: checkpointing})
        except (RayPeftError, ValueError):  # a method's rule
            return None

    share = spec.train.batch_size // spec.resources.num_workers
    sizes = [size for size in range(1, share + 1) if share % size == 0 and variant(size, False) is not None]
    if not sizes:
        return {}

    def holds(size: int, checkpointing: bool) -> bool:
        changed = variant(size, checkpointing)
        return changed is not None and fits(predict(changed))

    plain = _largest(sizes, lambda size: holds(size, False))
    if plain is None:
        return {MICRO_BATCH: _largest(sizes, lambda size: holds(size, True)) or sizes[0], CHECKPOINTING: True}
    unchecked = variant(plain, False)
    fixed_rows = predict(unchecked).fixed_rows if unchecked is not None else None
    time = _row_time(plain, fixed_rows, checkpointing=False)
    if time >= _row_time(sizes[-1], fixed_rows, checkpointing=True):
        spared = _largest(sizes, lambda size: holds(size, True)) or sizes[0]
        if time >= _row_time(spared, fixed_rows, checkpointing=True):
            return {MICRO_BATCH: spared, CHECKPOINTING: True}
    return {MICRO_BATCH: plain, CHECKPOINTING: False}


def _row_time(rows: int, fixed_rows: float | None, *, checkpointing: bool) -> float:
    """Time of one row in a pass of `rows` rows, in any unit: only times with the same `fixed_rows` can be compared."""
    if fixed_rows is None:
        return (WORTH_CHECKPOINTING if checkpointing else 1) / rows
    return (RECOMPUTED if checkpointing else 1.0) * (1 + fixed_rows / rows)


def _order(suggestion: Suggestion) -> tuple[bool, bool, int, int]:
    """What fits comes first, then what keeps the training, then fewer changes, then the larger micro-batch."""
    changes = suggestion.changes
    return not suggestion.fits, not suggestion.same_training, len(changes), -int(changes.get(MICRO_BATCH, 0))


def _largest(sizes: list[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending `sizes` that fits, found by bisection: memory grows with the size."""
    if not sizes or not fits(sizes[0]):
        return None
    low, high = 0, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low]


def _smaller(spec: TrialSpec) -> list[int]:
    """Smaller micro-batches with the same effective batch, ascending."""
    train, workers = spec.train, spec.resources.num_workers
    return [size for size in range(1, train.micro_batch_size) if train.batch_size % (size * workers) == 0]


def _checkpointing(spec: TrialSpec) -> list[dict[str, Any]]:
    return [{}] if spec.train.gradient_checkpointing else [{}, {CHECKPOINTING: True}]


def _least(spec: TrialSpec) -> dict[str, Any]:
    """The least that a pass can take: micro-batch 1 and checkpointing, where they are allowed."""
    least: dict[str, Any] = {} if spec.train.gradient_checkpointing else {CHECKPOINTING: True}
    return least | ({MICRO_BATCH: 1} if _changed(spec, {MICRO_BATCH: 1}) is not None else {})


def _other_training(spec: TrialSpec) -> Iterator[dict[str, Any]]:
    """Weights spread over several workers, another storage of the moments, another method."""
    least = _least(spec)
    if spec.resources.num_workers > 1:
        yield {STRATEGY: "fsdp", **least}
    yield {"method.optim": "adamw_8bit", **least}
    if spec.method.needs_full_weights:
        yield {"method": {"name": "lora"}, **least}
    if isinstance(spec.method, Adapter) and not isinstance(spec.method, LoRA | QLoRA):
        yield {"model.quantization": {"quant_type": "nf4"}, **least}
    elif spec.quantization is None and spec.task in QLoRA.tasks:
        own = spec.method.plain() if isinstance(spec.method, LowRankAdapter) else {}
        shared = {key: value for key, value in own.items() if key in QLoRA.model_fields and key != "name"}
        yield {"method": {"name": "qlora", **shared}, **least}


def _shorter(spec: TrialSpec) -> Iterator[int]:
    length = getattr(spec.data, "max_length", 0)
    while length >= 256:
        length //= 2
        yield length


def _changed(spec: TrialSpec, changes: Mapping[str, Any]) -> TrialSpec | None:
    """The trial with other settings; None where its rules forbid them, or one of them changes nothing."""
    try:
        variant = spec.changed(changes)
    except (RayPeftError, ValueError):
        return None
    before, after = spec.plain(), variant.plain()
    return None if any(dotted.get(before, key) == dotted.get(after, key) for key in changes) else variant
