"""What the trials of a search space will take, whether they fit, how they share GPUs, and what to change if not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_peft.foundation.units import GIB
from ray_peft.schedule.placement import Need, Packing, fit
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.vram import Prediction, Suggestion, settings_text
from ray_peft.vram.cards import ANY, Gpu
from ray_peft.vram.fit import Size, size


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


def size_of(trial: TrialSpec, gpu: Gpu, gpu_memory_gib: float | None) -> Size:
    """A trial's memory, by its task's prediction. Raises as `vram.fit.size`."""
    return size(trial, TASKS[trial.task].predictor(trial), gpu, gpu_memory_gib)


def need(trial_id: str, found: Size, gpu: Gpu) -> Need | None:
    """What a trial of a size needs for its placement; None where nothing predicts it."""
    if found.prediction is None:
        return None
    most, least = gpu.footprint(found.prediction.needed), gpu.footprint(found.prediction.peak_reserved)
    asked = found.runs.resources
    return Need(trial_id, most, asked.num_workers, least, asked.gpus_per_worker or None)


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
    sizes = {trial.trial_id: size_of(trial, gpu, gpu_memory_gib) for trial in trials}
    if gpu_memory_gib is None:
        return [Forecast(trial, sizes[trial.trial_id].prediction) for trial in trials], None
    needs = [known for trial_id, found in sizes.items() if (known := need(trial_id, found, gpu)) is not None]
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
