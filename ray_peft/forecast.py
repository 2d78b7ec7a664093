"""What the trials of a search space will take, whether they fit, how they share GPUs, and what to change if not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_peft.errors import RayPeftError
from ray_peft.foundation.units import GIB
from ray_peft.methods.base import ENOUGH_STEPS
from ray_peft.placement import Need, Packing, fit
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.vram import Prediction, Suggestion, choose, nearest, settings_text
from ray_peft.vram.cards import ANY, Gpu

Predictor = Callable[[TrialSpec, Gpu], Prediction]


@dataclass(frozen=True)
class Size:
    """What a trial takes of a GPU."""

    runs: TrialSpec
    """The trial, with what `train.fit: auto` chose in place."""
    prediction: Prediction | None
    """None where nothing can predict it."""
    chosen: dict[str, int | bool] = field(default_factory=dict)
    """What `train.fit: auto` chose for it, by key."""
    less: tuple[Suggestion, ...] = ()
    """What takes less, where it does not fit."""
    problem: str = ""
    """Why nothing predicts it, if that is an error."""

    def bytes(self) -> tuple[int, int]:
        """By which trials are ordered; zeros where nothing predicts it."""
        found = self.prediction
        return (found.needed, found.peak_reserved) if found is not None else (0, 0)

    def need(self, trial_id: str, gpu: Gpu) -> Need | None:
        """For its placement; None where nothing predicts it."""
        if self.prediction is None:
            return None
        most, least = gpu.footprint(self.prediction.needed), gpu.footprint(self.prediction.peak_reserved)
        asked = self.runs.resources
        return Need(trial_id, most, asked.num_workers, least, asked.gpus_per_worker or None)


@dataclass(frozen=True)
class Forecast:
    """One trial's memory, and where it would run."""

    trial: TrialSpec
    prediction: Prediction | None
    """None where nothing can predict it."""
    chosen: dict[str, int | bool] = field(default_factory=dict)
    """What `train.fit: auto` chooses for it, by key."""
    fits: bool | None = None
    """None where no GPU was named."""
    gpu_fraction: float | None = None
    order: int | None = None
    """Place in the order of starting, from 1; None for what does not fit."""
    suggestions: tuple[Suggestion, ...] = ()
    """For what does not fit."""

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        said: dict[str, Any] = {"predicted_peak_gib": None}
        if self.prediction is not None:
            evaluation = self.prediction.evaluation
            parts = {kind: round(size / GIB, 4) for kind, size in self.prediction.components.items()}
            said = {
                "predicted_peak_gib": round(self.prediction.peak_allocated / GIB, 4),
                "predicted_reserved_gib": round(self.prediction.peak_reserved / GIB, 4),
                "predicted_evaluation_gib": None if evaluation is None else round(evaluation / GIB, 4),
                "components": parts,
            }
        if self.fits is not None:
            said |= {"fits": self.fits, "gpu_fraction": self.gpu_fraction, "order": self.order, "chosen": self.chosen}
            said["suggestions"] = [
                {
                    "changes": each.changes,
                    "predicted_peak_gib": round(each.predicted.peak_allocated / GIB, 4),
                    "fits": each.fits,
                    "same_training": each.same_training,
                }
                for each in self.suggestions
            ]
        return said


def size(trial: TrialSpec, gpu: Gpu, gpu_memory_gib: float | None) -> Size:
    """A trial's memory; on `gpu_memory_gib` of a GPU, with what `train.fit: auto` chooses, or what takes less.

    Raises:
        DataError, ModelError: the user's to mend.
    """
    predictor = TASKS[trial.task].predictor(trial)
    if predictor is None:
        return Size(trial, None)
    try:
        return _size(trial, predictor, gpu, gpu_memory_gib)
    except RayPeftError:
        raise
    except Exception:  # noqa: BLE001 - an architecture that cannot be built or run on shapes, whatever it raises
        return Size(trial, None)


def _size(trial: TrialSpec, predictor: Predictor, gpu: Gpu, gpu_memory_gib: float | None) -> Size:
    if gpu_memory_gib is None:
        return Size(trial, predictor(trial, gpu))
    room = gpu_memory_gib * (trial.resources.gpus_per_worker or 1.0)
    chosen: dict[str, int | bool] = {}
    if trial.train.fit == "auto" and _trains(trial):
        chosen = choose(trial, lambda variant: predictor(variant, gpu), lambda each: _fits(each, gpu, room))
    runs = trial.changed(chosen) if chosen else trial
    found = predictor(runs, gpu)
    return Size(runs, found, chosen, () if _fits(found, gpu, room) else _ways(runs, predictor, gpu, room))


def ways(trial: TrialSpec, gpu: Gpu, gpu_memory_gib: float, below: int | None = None) -> tuple[Suggestion, ...]:
    """The settings nearest to a trial's that take less, computed; none for a trial that trains nothing.

    Args:
        trial: as it runs.
        gpu: the card.
        gpu_memory_gib: what the trial may take of it.
        below: bytes of segments that were too much, whatever the prediction said.
    """
    predictor = TASKS[trial.task].predictor(trial)
    return _ways(trial, predictor, gpu, gpu_memory_gib, below) if predictor is not None else ()


def _ways(
    trial: TrialSpec, predictor: Predictor, gpu: Gpu, gpu_memory_gib: float, below: int | None = None
) -> tuple[Suggestion, ...]:
    if not _trains(trial):
        return ()

    def fits(found: Prediction) -> bool:
        return _fits(found, gpu, gpu_memory_gib) and (below is None or found.peak_reserved < below)

    def predicted(variant: TrialSpec) -> Prediction | None:
        try:
            return predictor(variant, gpu)
        except Exception:  # noqa: BLE001 - a variant that cannot be predicted is none to suggest
            return None

    return tuple(nearest(trial, predicted, fits))


def forecast(
    trials: Sequence[TrialSpec], *, gpu_memory_gib: float | None = None, gpus: int = 1, gpu: Gpu = ANY
) -> tuple[list[Forecast], Packing | None]:
    """Every trial's memory, in the order given; with a GPU's memory, also how they pack.

    A trial fits if the peak of its training, with the allocator's slack, the CUDA context and a margin, is at most the
    GPU's memory. An evaluation that takes more decides its share alone: its batch can be lowered, which in
    fp32 changes no score.

    Raises:
        DataError, ModelError: the user's to mend.
    """
    sizes = {trial.trial_id: size(trial, gpu, gpu_memory_gib) for trial in trials}
    if gpu_memory_gib is None:
        return [Forecast(trial, sizes[trial.trial_id].prediction) for trial in trials], None
    needs = [need for trial_id, found in sizes.items() if (need := found.need(trial_id, gpu)) is not None]
    packing = fit(needs, gpu_memory_gib, gpus)
    seats = {seat.trial_id: (place, seat) for place, seat in enumerate(packing.seats, start=1)}
    made = []
    for trial in trials:
        found = sizes[trial.trial_id]
        if found.prediction is None:
            made.append(Forecast(trial, None))
            continue
        place, seat = seats[trial.trial_id]
        order = place if seat.fits else None
        made.append(Forecast(trial, found.prediction, found.chosen, seat.fits, seat.gpu_fraction, order, found.less))
    return made, packing


def _trains(trial: TrialSpec) -> bool:
    return bool(trial.method.stages(ENOUGH_STEPS))


def _fits(found: Prediction, gpu: Gpu, gpu_memory_gib: float) -> bool:
    return gpu.holds(found.peak_reserved, memory_gib=gpu_memory_gib)


def lines(
    made: Sequence[Forecast], labels: dict[str, str], packing: Packing | None, gpu_memory_gib: float
) -> list[str]:
    """For people: a line a trial, what to change where it does not fit, and how they share GPUs."""
    said = []
    for each in made:
        line = f"{each.trial.trial_id}  {labels[each.trial.trial_id]}"
        if each.prediction is not None:
            line += f"  peak {each.prediction.peak_allocated / GIB:.2f} GiB"
        if each.fits is not None:
            line += f", {each.gpu_fraction:g} of a GPU" if each.fits else ", DOES NOT FIT"
            line += f", with {settings_text(each.chosen)}" if each.chosen else ""
            line += "; what takes less:" if each.suggestions else ""
        said.append(line)
        said += [f"    {suggestion.line()}" for suggestion in each.suggestions]
    if packing is not None:
        fitting = sum(each.fits is True for each in made)
        unknown = sum(each.prediction is None for each in made)
        said.append(
            f"{fitting} of {len(made)} trials fit {gpu_memory_gib:g} GiB"
            f"{f', {unknown} cannot be predicted' if unknown else ''}; at most {packing.at_once} at "
            f"once, in {len(packing.packs)} packs, the largest first"
        )
    return said
