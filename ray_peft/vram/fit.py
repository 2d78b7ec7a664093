"""A trial on a GPU: what it takes there, what `train.fit: auto` chooses for it, and what takes less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ray_peft.errors import RayPeftError
from ray_peft.methods.base import ENOUGH_STEPS
from ray_peft.spec import TrialSpec
from ray_peft.vram.cards import Gpu
from ray_peft.vram.nearest import Suggestion, choose, nearest
from ray_peft.vram.predict import Prediction

Predictor = Callable[[TrialSpec, Gpu], Prediction]


@dataclass(frozen=True)
class Size:
    """What a trial takes of a GPU."""

    prediction: Prediction | None = None
    """With what `train.fit: auto` chose in place; None where nothing can predict it."""
    chosen: dict[str, int | bool] = field(default_factory=dict)
    """What `train.fit: auto` chose for it, by key."""
    less: tuple[Suggestion, ...] = ()
    """What takes less, where it does not fit."""
    problem: str = ""
    """Why nothing predicts it, if that is an error."""


def size(trial: TrialSpec, predictor: Predictor | None, gpu: Gpu, gpu_memory_gib: float | None) -> Size:
    """A trial's memory; on `gpu_memory_gib` of a GPU, with what `train.fit: auto` chooses, or what takes less.

    Args:
        trial: as it is written.
        predictor: its task's, of this trial; None where nothing can predict it.
        gpu: the card.
        gpu_memory_gib: what the trial may take of it; None asks for the prediction alone.

    Raises:
        DataError, ModelError: the user's to mend.
    """
    if predictor is None:
        return Size()
    try:
        return _size(trial, predictor, gpu, gpu_memory_gib)
    except RayPeftError:
        raise
    except Exception:  # noqa: BLE001 - an architecture that cannot be built or run on shapes, whatever it raises
        return Size()


def _size(trial: TrialSpec, predictor: Predictor, gpu: Gpu, gpu_memory_gib: float | None) -> Size:
    if gpu_memory_gib is None:
        return Size(predictor(trial, gpu))
    room = gpu_memory_gib * (trial.resources.gpus_per_worker or 1.0)
    chosen: dict[str, int | bool] = {}
    if trial.train.fit == "auto" and _trains(trial):
        chosen = choose(trial, lambda variant: predictor(variant, gpu), lambda prediction: _fits(prediction, gpu, room))
    runs = trial.changed(chosen) if chosen else trial
    prediction = predictor(runs, gpu)
    return Size(prediction, chosen, () if _fits(prediction, gpu, room) else ways(runs, predictor, gpu, room))


def ways(
    trial: TrialSpec, predictor: Predictor | None, gpu: Gpu, gpu_memory_gib: float, below: int | None = None
) -> tuple[Suggestion, ...]:
    """The settings nearest to a trial's that take less, computed; none for a trial that trains nothing.

    Args:
        trial: as it runs.
        predictor: its task's, of this trial; None where nothing can predict it.
        gpu: the card.
        gpu_memory_gib: what the trial may take of it.
        below: bytes of segments that were too much, whatever the prediction said.
    """
    if predictor is None or not _trains(trial):
        return ()

    def fits(prediction: Prediction) -> bool:
        return _fits(prediction, gpu, gpu_memory_gib) and (below is None or prediction.peak_reserved < below)

    def predicted(variant: TrialSpec) -> Prediction | None:
        try:
            return predictor(variant, gpu)
        except Exception:  # noqa: BLE001 - a variant that cannot be predicted is none to suggest
            return None

    return tuple(nearest(trial, predicted, fits))


def _trains(trial: TrialSpec) -> bool:
    return bool(trial.method.stages(ENOUGH_STEPS))


def _fits(prediction: Prediction, gpu: Gpu, gpu_memory_gib: float) -> bool:
    return gpu.holds(prediction.peak_reserved, memory_gib=gpu_memory_gib)
