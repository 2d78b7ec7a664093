"""What the trials of a search space will take, whether they fit, how they share GPUs, and what to change if not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray_peft.gpus import ANY, Gpu
from ray_peft.placement import GIB, Need, Packing, fit
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.vram import Prediction, Suggestion, nearest


@dataclass(frozen=True)
class Forecast:
    """One trial's memory, and where it would run."""

    trial: TrialSpec
    prediction: Prediction | None
    """Null where nothing can predict it."""
    fits: bool | None = None
    """Null where no GPU was named."""
    gpu_fraction: float | None = None
    order: int | None = None
    """Place in the order of starting, from 1; null for what does not fit."""
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
            said |= {"fits": self.fits, "gpu_fraction": self.gpu_fraction, "order": self.order}
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


def forecast(
    trials: Sequence[TrialSpec], *, gpu_memory_gib: float | None = None, gpus: int = 1, gpu: Gpu = ANY
) -> tuple[list[Forecast], Packing | None]:
    """Every trial's memory, in the order given; with a GPU's memory, also how they pack.

    A trial fits if the peak of its training, with the allocator's slack, the CUDA context and a margin, is at most the
    GPU's memory. An evaluation that takes more is not counted: its batch can be lowered without changing a score.

    Raises:
        DataError, ModelError: the user's to mend.
    """
    predictions = {trial.trial_id: _predict(trial, gpu) for trial in trials}
    if gpu_memory_gib is None:
        return [Forecast(trial, predictions[trial.trial_id]) for trial in trials], None
    needs = [
        Need(trial.trial_id, gpu.footprint(found.peak_reserved), trial.resources.num_workers)
        for trial in trials
        if (found := predictions[trial.trial_id]) is not None
    ]
    packing = fit(needs, gpu_memory_gib, gpus)
    seats = {seat.trial_id: (place, seat) for place, seat in enumerate(packing.seats, start=1)}

    def holds(found: Prediction) -> bool:
        return gpu.holds(found.peak_reserved, memory_gib=gpu_memory_gib)

    made = []
    for trial in trials:
        found = predictions[trial.trial_id]
        if found is None:
            made.append(Forecast(trial, None))
            continue
        place, seat = seats[trial.trial_id]
        ways = (
            ()
            if holds(found) or not trial.method.stages(1000)
            else tuple(nearest(trial, lambda v: _sure(v, gpu), holds))
        )
        made.append(Forecast(trial, found, seat.fits, seat.gpu_fraction, place if seat.fits else None, ways))
    return made, packing


def _predict(trial: TrialSpec, gpu: Gpu) -> Prediction | None:
    try:
        return TASKS[trial.task].predict(trial, gpu)
    except (ValueError, NotImplementedError):  # an architecture that cannot be built from its config here
        return None


def _sure(trial: TrialSpec, gpu: Gpu) -> Prediction:
    found = TASKS[trial.task].predict(trial, gpu)
    assert found is not None
    return found


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
