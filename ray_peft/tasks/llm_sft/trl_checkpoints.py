"""TRL's checkpoints of a stage: which one is whole, what its steps cost, and when the ones before it may go."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray_peft.engine import cost
from ray_peft.engine.trained import Costs, Trained

_STATE = "trainer_state.json"


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that is whole; None without one: a killed process, or a full disk, leaves part of one."""
    return max(filter(_is_whole, folder.glob("checkpoint-*")), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps of the stage that it holds."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    if not checkpoint.name.rpartition("-")[2].isdecimal():
        return False
    if (checkpoint / cost.COST_FILE).is_file():
        return True
    try:  # version 0.1.0 wrote no costs; the Trainer writes its state last
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


class Meter:
    """What a stage has taken, from its first start on; `trainer` is an SFTTrainer of TRL 1.16."""

    def __init__(self, trained: Trained, trainer: Any, costs: Costs) -> None:
        self._trained, self._trainer, self._costs = trained, trainer, costs
        self._begin = 0.0
        self._done = 0

    def start(self, checkpoint: Path | None, first_step: int) -> None:
        """Begin to count, from a checkpoint's numbers if there is one.

        Args:
            checkpoint: of the stage.
            first_step: optimizer steps that earlier stages of the trial have done.
        """
        if checkpoint is not None:
            cost.take_up(cost.read(checkpoint), self._trained, self._costs, checkpoint)
            self._done = step_of(checkpoint)
            self._trained.resumed_from_step = first_step + self._done
            # TRL begins at zero, also where the Trainer goes on; it keeps no public name for it.
            self._trainer._total_train_tokens = self._trained.tokens
        self._timed = self._trained.timed_steps
        self._begin = time.perf_counter()

    def so_far(self) -> Trained:
        """The stage up to now."""
        step = int(self._trainer.state.global_step)
        return replace(
            self._trained,
            steps=step,
            timed_steps=self._timed + step - self._done,
            tokens=int(self._trainer._total_train_tokens),  # noqa: SLF001
            seconds=self._trained.seconds + time.perf_counter() - self._begin,
        )

    def keep(self, folder: Path) -> None:
        """Add the costs to the checkpoint of this step; older ones go after that."""
        checkpoint = folder / f"checkpoint-{self._trainer.state.global_step}"
        cost.write(checkpoint, cost.plain(self.so_far(), self._costs))
        for old in folder.glob("checkpoint-*"):
            if old != checkpoint:
                shutil.rmtree(old, ignore_errors=True)
