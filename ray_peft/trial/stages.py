"""Trains, keeps and merges the stages of a trial in turn; resumes after the last one that an interrupted run kept."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

from ray_peft.engine import cost
from ray_peft.engine.finite import ways_out
from ray_peft.engine.recovery import free_memory
from ray_peft.engine.trained import Trained
from ray_peft.errors import TrialFailed
from ray_peft.foundation.seal import SEAL_FILE, broken, seal
from ray_peft.foundation.whole import write_text
from ray_peft.methods.base import Stage
from ray_peft.tasks.base import Bench
from ray_peft.trial import warm
from ray_peft.trial.life import Life, Place, keep
from ray_peft.trial.rounding import check_same_loss

logger = logging.getLogger(__name__)

STAGE_FILE = "stage.json"
"""In the folder of a stage's adapter: the costs of all stages up to it, for a trial that resumes there."""


def train_all(life: Life, bench: Bench, stages: list[tuple[Stage, int]]) -> None:
    """Train every stage, and merge between two of them."""
    for index, (stage, steps) in enumerate(stages):
        life.process.memory.start()
        if not _resume_stage(life, bench, index, stage):
            with life.process.clock.phase("train"):
                _train(life, bench, index, stage, steps)
            free_memory(life.place.device)  # trainer and optimizer refer to each other: by themselves they stay
        life.process.memory.stop()
        if index + 1 < len(stages):
            _keep_and_merge(life, bench, index, stage)


def _train(life: Life, bench: Bench, index: int, stage: Stage, steps: int) -> None:
    bench.attach(stage)
    if life.spec.train.warm_start is not None:
        warm.start(life.place.folder, bench, life.spec.train.warm_start)
    life.parameters = bench.parameters()
    earlier = life.trained
    more = bench.train(stage, steps, earlier.steps, life.place.folder / f"stage{index + 1}", life.report)
    life.trained = Trained(
        steps=earlier.steps + more.steps,
        tokens=earlier.tokens + more.tokens,
        images=earlier.images + more.images,
        seconds=earlier.seconds + more.seconds,
        timed_steps=earlier.timed_steps + more.timed_steps,
        losses=earlier.losses + more.losses,
        eval_losses=earlier.eval_losses + more.eval_losses,
        resumed_from_step=more.resumed_from_step if more.resumed_from_step is not None else earlier.resumed_from_step,
        passes="; then ".join(dict.fromkeys(text for text in (earlier.passes, more.passes) if text)),
    )


def stage_folder(place: Place, index: int) -> Path:
    """Where a stage before the last keeps its adapter."""
    return place.folder / f"stage{index + 1}_adapter"


def _write_stage(life: Life, folder: Path) -> None:
    """Note that all stages up to this one are done; the seal, which is written last, vouches for all of it."""
    write_text(folder / STAGE_FILE, json.dumps(cost.plain(life.trained, life.costs)))
    seal(folder)


def _resume_stage(life: Life, bench: Bench, index: int, stage: Stage) -> bool:
    """Load what an interrupted run of the trial trained in a stage; False if there is nothing, or it is damaged."""
    folder = stage_folder(life.place, index)
    if not folder.is_dir():
        return False
    saved_cost = _read_stage_cost(folder)
    if saved_cost is None:
        if life.place.rank == 0:
            _remove_from(life.place, index)
        return False
    bench.attach(stage)
    bench.restore(folder)
    life.parameters = bench.parameters()
    cost.restore(saved_cost, life.trained, life.costs, folder)
    life.trained.resumed_from_step = life.trained.steps
    return True


def _read_stage_cost(folder: Path) -> dict[str, Any] | None:
    """The costs of all stages up to the one whose adapter is in `folder`; None if the folder is damaged."""
    file = folder / STAGE_FILE
    if not file.is_file() and not (folder / SEAL_FILE).is_file():
        return None  # a process was killed while it wrote the adapter, or the trial has ended
    reason = broken(folder)
    try:
        saved_cost: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if reason is None:
            return saved_cost
        if "train_s" in saved_cost and not (folder / SEAL_FILE).is_file():  # of version 0.1.0, which knew no seals
            train_s = saved_cost["train_s"]
            trial = {"seconds": {"train": train_s}, "wall_s": train_s, "peaks": saved_cost["peaks"]}
            return saved_cost | {"trial": trial}
    except (OSError, ValueError, LookupError) as error:
        reason = reason or str(error)
    logger.warning("%s is not whole, so its stage is trained again: %s", folder, reason)
    return None


def _remove_from(place: Place, index: int) -> None:
    """Remove a stage's kept adapter and all that later stages left.

    Later stages started from weights that are trained again now, which on a GPU need not be equal bit by bit.
    """
    shutil.rmtree(stage_folder(place, index), ignore_errors=True)
    later = index + 1
    while (folder := place.folder / f"stage{later + 1}").is_dir() or stage_folder(place, later).is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(stage_folder(place, later), ignore_errors=True)
        later += 1


def _keep_and_merge(life: Life, bench: Bench, index: int, stage: Stage) -> None:
    """Between two stages: keep what the first one trained, merge it, and measure the loss before and after.

    Raises:
        TrialFailed: a loss is not finite, or the merge changed it by more than rounding does.
    """
    first = life.place.rank == 0
    folder = stage_folder(life.place, index)
    if first:
        with life.process.clock.phase("save"):
            if not (folder / STAGE_FILE).is_file():
                keep(life, bench, folder.name, "float32")  # as it is: the trial may go on from here
                _write_stage(life, folder)
            elif life.tracker is not None:  # resumed: other workers may still read it, and the tracker lacks it
                life.tracker.artifact(folder, folder.name)
    dtypes_before = bench.dtypes()
    for moment in (f"after stage {index + 1}", f"after merge {index + 1}"):
        if moment.startswith("after merge"):
            with life.process.clock.phase("train"):
                bench.merge(stage)
        if first:
            with life.process.clock.phase("evaluate"):
                life.boundaries[moment] = bench.eval_loss()
            life.report({f"boundary_loss.{moment.replace(' ', '_')}": life.boundaries[moment]}, life.trained.steps)
            if life.place.num_workers == 1:  # nothing that starts from these weights can end well
                _check_finite(life, stage, moment, life.boundaries[moment])
    before, after = _broadcast_losses(life, index)
    for moment, loss in ((f"after stage {index + 1}", before), (f"after merge {index + 1}", after)):
        _check_finite(life, stage, moment, loss)
    check_same_loss(before, after, [*dtypes_before, *bench.dtypes()], f"merging what {stage.name} trained")


def _check_finite(life: Life, stage: Stage, moment: str, loss: float) -> None:
    if not math.isfinite(loss):
        raise TrialFailed(f"the held-out loss is {loss} {moment}; {ways_out(life.runs, stage)}")


def _broadcast_losses(life: Life, index: int) -> list[float]:
    """The losses before and after a merge, measured by rank 0, on all workers: they must end, or go on, together."""
    losses = [life.boundaries.get(f"after {moment} {index + 1}", 0.0) for moment in ("stage", "merge")]
    if life.place.num_workers > 1:
        import torch.distributed

        torch.distributed.broadcast_object_list(losses, src=0)
    return losses
