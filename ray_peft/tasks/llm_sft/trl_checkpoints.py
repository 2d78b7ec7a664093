"""TRL's checkpoints of a stage: which ones are complete, what their steps cost, and when older ones are removed.

The Trainer writes the files of a checkpoint one after the other, in place. Then the costs are added, and last the seal.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray_peft.engine import cost
from ray_peft.engine.checkpoint import numbered, remove_older, step_of, warn_of_damage
from ray_peft.engine.trained import Costs, Trained
from ray_peft.foundation.seal import SEAL_FILE, broken, seal

_STATE = "trainer_state.json"


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint; None if there is none. A killed process or a full disk leaves an incomplete one."""
    for checkpoint in numbered(folder):
        reason = broken(checkpoint)
        if reason is None or _is_of_first_version(checkpoint):
            return checkpoint
        warn_of_damage(checkpoint, reason)
    return None


def _is_of_first_version(checkpoint: Path) -> bool:
    """Whether version 0.1.0 wrote it completely, without costs and seal: the Trainer writes its state last.

    Nothing shows whether its other files have changed since.
    """
    if (checkpoint / SEAL_FILE).exists() or (checkpoint / cost.COST_FILE).exists():
        return False
    try:
        json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


class Meter:
    """Steps, tokens and seconds of a stage since its first start; `trainer` is an SFTTrainer of TRL 1.16."""

    def __init__(self, trained: Trained, trainer: Any, costs: Costs) -> None:
        self._trained, self._trainer, self._costs = trained, trainer, costs
        self._begin = 0.0
        self._restored_steps = 0

    def start(self, checkpoint: Path | None, first_step: int) -> None:
        """Begin to count; if there is a checkpoint, from its numbers on.

        Args:
            checkpoint: that of the stage to go on from.
            first_step: optimizer steps that earlier stages of the trial have done.
        """
        if checkpoint is not None:
            cost.restore(cost.read(checkpoint), self._trained, self._costs, checkpoint)
            self._restored_steps = step_of(checkpoint)
            self._trained.resumed_from_step = first_step + self._restored_steps
            # TRL begins at zero even if the Trainer resumes, and has no public name for this number.
            self._trainer._total_train_tokens = self._trained.tokens
        self._timed = self._trained.timed_steps
        self._begin = time.perf_counter()

    def so_far(self) -> Trained:
        """The numbers of the stage up to now."""
        step = int(self._trainer.state.global_step)
        return replace(
            self._trained,
            steps=step,
            timed_steps=self._timed + step - self._restored_steps,
            tokens=int(self._trainer._total_train_tokens),  # noqa: SLF001
            seconds=self._trained.seconds + time.perf_counter() - self._begin,
        )

    def keep(self, folder: Path) -> None:
        """Complete the checkpoint of this step; then remove all but it and the previous one."""
        step = int(self._trainer.state.global_step)
        checkpoint = folder / f"checkpoint-{step}"
        cost.write(checkpoint, cost.plain(self.so_far(), self._costs))
        seal(checkpoint)
        remove_older(folder, step)
