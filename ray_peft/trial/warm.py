"""A warm start: what another trial of the sweep had trained, kept in the folder of the trial that starts from it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from ray_peft.engine import checkpoint
from ray_peft.errors import DataError, TrialFailed, first_line
from ray_peft.foundation.storage import writing
from ray_peft.methods.base import ENOUGH_STEPS
from ray_peft.spec import TrialSpec
from ray_peft.spec.base import WarmStart
from ray_peft.tasks.base import Bench
from ray_peft.tasks.one_model import ADAPTER_CONFIG
from ray_peft.trial.result import TrialResult
from ray_peft.vram import decides_memory

START = "start"
"""The folder with the weights, in that of the trial that starts from them; it goes once the trial has finished."""

ADAPTER = "adapter"
"""The folder of a trial with what it saved at its end."""


@dataclass(frozen=True)
class Source:
    """Weights of a trial that another one can start from."""

    folder: Path
    """A checkpoint, or a saved adapter."""
    step: int
    """Optimizer steps of the trial by then."""


def source(folder: Path, trial: TrialSpec, row: TrialResult | None) -> Source:
    """The last checkpoint of a trial, or of one that has ended what it saved.

    Args:
        folder: of the trial.
        trial: whose method has one stage.
        row: the trial's; None while it runs or waits.

    Raises:
        DataError: it has neither.
    """
    for path in checkpoint.numbered(folder / "stage1"):
        if (path / checkpoint.STATE_FILE).is_file():
            return Source(path, checkpoint.step_of(path))
    adapter = folder / ADAPTER
    if row is None:
        raise DataError(
            f"trial {trial.trial_id} has no checkpoint yet (train.checkpoint_every: {trial.train.checkpoint_every}); "
            "`pause` lets running trials write one"
        )
    if (adapter / ADAPTER_CONFIG).is_file() and row.steps:
        if any(stage.changes_base for stage, _ in trial.method.stages(ENOUGH_STEPS)):
            raise DataError(
                f"trial {trial.trial_id} has ended, and method {trial.method.name} saves another adapter than it "
                "trains; a warm clone needs its checkpoint, which it has until it ends"
            )
        return Source(adapter, row.steps)
    raise DataError(
        f"trial {trial.trial_id} ({row.status}) left neither a checkpoint nor an adapter in {folder}; if it trained "
        "the whole model, `ray-peft export` writes its weights: name their folder as model.name of a new search space"
    )


def check(trial: TrialSpec, clone: TrialSpec) -> None:
    """Whether a clone can start from what a trial has trained: the same weights must be trained in both.

    Raises:
        DataError: they are of several stages, or settings differ that decide which weights there are.
    """
    if len(trial.method.stages(ENOUGH_STEPS)) != 1:
        raise DataError(f"method {trial.method.name} does not train in one stage, so it has no warm start")
    first, second = _which_weights(trial), _which_weights(clone)
    for key in first | second:
        if first.get(key) != second.get(key):
            raise DataError(
                f"a warm start needs the same weights, but {key} is {first.get(key)} in {trial.trial_id} and "
                f"{second.get(key)} in the clone; leave --warm out to train it from the base"
            )


def _which_weights(trial: TrialSpec) -> dict[str, object]:
    """The settings that decide which weights are trained, by key; the seed draws those that an adapter freezes."""
    return {
        "task": trial.task,
        **{f"model.{name}": value for name, value in trial.model.plain().items()},
        **{f"method.{name}": value for name, value in decides_memory(trial.method).items()},
        "seed": trial.seed,
    }


def copy(weights: Source, trial_folder: Path) -> None:
    """Copy weights for the trial that starts from them; a checkpoint is linked where the file system can.

    Raises:
        DataError: they are gone, since their trial goes on meanwhile.
        StorageError: the system refuses.
    """
    folder = trial_folder / START
    shutil.rmtree(folder, ignore_errors=True)
    with writing(folder, "free some space, and ask again"):
        if weights.folder.name == ADAPTER:
            shutil.copytree(weights.folder, folder)
            return
        target = folder / weights.folder.name / checkpoint.STATE_FILE
        target.parent.mkdir(parents=True)
        state = weights.folder / checkpoint.STATE_FILE
        try:
            _link(state, target)
        except FileNotFoundError:
            raise DataError(f"{state} was replaced by a later one in this moment; ask again") from None


def _link(source: Path, target: Path) -> None:
    """A checkpoint never changes, so it may have two names."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def start(trial_folder: Path, bench: Bench, origin: WarmStart) -> None:
    """Give the attached stage the weights in the trial's folder.

    Raises:
        TrialFailed: they are not there, or of other shapes.
    """
    folder = trial_folder / START
    try:
        bench.start_from(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise TrialFailed(
            f"cannot start from what {origin.trial} had trained by step {origin.step}, which should be in {folder}: "
            f"{first_line(error)}; cancel this trial, and clone {origin.trial} again"
        ) from None


def forget(trial_folder: Path) -> None:
    """Remove the weights that a finished trial started from."""
    shutil.rmtree(trial_folder / START, ignore_errors=True)
