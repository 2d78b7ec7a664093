"""When a stage's next checkpoint is due: after so many steps, or so much time."""

from __future__ import annotations

import time

from ray_peft.engine.workers import from_first, this_worker
from ray_peft.foundation.durations import seconds_of

LEAST_TRAINED = 20
"""Training lasts at least this many times as long as the last checkpoint took to write, before the next one is written
by time. So checkpoints take at most a twentieth of the time."""

WORTH_KEEPING_S = 60.0
"""Seconds of training after which the end of a stage writes a checkpoint: a trial that is killed in its evaluation
resumes there."""


class Due:
    """Says after which steps a checkpoint is written."""

    def __init__(self, every: int | str | None, device: str = "cpu") -> None:
        """Count from now on.

        The clocks of data-parallel workers differ, so the first one decides for all, at logged steps.

        Args:
            every: optimizer steps, or a time in words; None writes no checkpoint.
            device: where workers exchange numbers.
        """
        self._steps = every if isinstance(every, int) else None
        self._seconds = seconds_of(every) if isinstance(every, str) else None
        self._workers, self._device = this_worker().workers, device
        self.start()
        self._took = 0.0

    @property
    def ever(self) -> bool:
        """True if the stage writes checkpoints at all."""
        return self._steps is not None or self._seconds is not None

    def start(self) -> None:
        """Count from now on."""
        self._since = self._begin = time.monotonic()

    def after(self, steps_done: int, steps: int, *, logged: bool) -> bool:
        """Whether to write a checkpoint now. Every worker calls this, and calls `written` once it is written.

        Args:
            steps_done: optimizer steps of the stage.
            steps: of the whole stage.
            logged: the step that has just ended is logged.
        """
        self._begin = time.monotonic()
        if self._steps is not None:
            return steps_done % self._steps == 0 and steps_done < steps
        if self._seconds is None or (self._workers > 1 and not logged and steps_done < steps):
            return False
        between = max(self._seconds, LEAST_TRAINED * self._took)
        least = min(between, WORTH_KEEPING_S) if steps_done == steps else between
        passed = self._begin - self._since >= least
        return passed if self._workers == 1 else from_first(passed, self._device)

    def written(self) -> float:
        """Count from now on; returns the seconds since `after` was called."""
        self._since = time.monotonic()
        self._took = self._since - self._begin
        return self._took
