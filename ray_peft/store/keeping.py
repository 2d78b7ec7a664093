"""Writes a sweep's rows into its ledger, and runs its last steps. A failure there is reported and ends nothing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from ray_peft.errors import StorageError, first_line
from ray_peft.foundation.audience import Audience
from ray_peft.store.ledger import Ledger
from ray_peft.trial.result import TrialResult

logger = logging.getLogger(__name__)


class Rows:
    """Puts rows into the ledger; on a full disk they wait in memory, and each new row tries again."""

    def __init__(self, ledger: Ledger, console: Audience) -> None:
        self._ledger, self._console = ledger, console
        self._waiting: list[TrialResult] = []

    def add(self, result: TrialResult) -> None:
        """Write a row now, or as soon as the disk takes it. Never raises for a disk that refuses."""
        self._waiting.append(result)
        warned_before = len(self._waiting) > 1
        try:
            self.flush()
        except StorageError as error:
            if not warned_before:
                self._console.say(f"caution: {error}. Until the disk takes them, rows are kept in memory")

    @property
    def waiting(self) -> tuple[TrialResult, ...]:
        """Rows that the ledger lacks."""
        return tuple(self._waiting)

    def flush(self) -> None:
        """Write what waits.

        Raises:
            StorageError: the disk still refuses; the text names the trials whose rows it lacks.
        """
        while self._waiting:
            try:
                self._ledger.add(self._waiting[0])
            except StorageError as error:
                lacking = ", ".join(row.trial_id for row in self._waiting)
                raise StorageError(f"{error}. Rows that it lacks: {lacking}") from None
            del self._waiting[0]


class LastSteps:
    """Runs all last steps, even where some fail; the first failure is raised after the last step."""

    def __init__(self) -> None:
        self._failures: list[Exception] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One of them."""
        try:
            yield
        except Exception as error:  # raised by `done`
            self._failures.append(error)

    def done(self) -> None:
        """Raise the first failure, if there was one; further ones that say something else are logged."""
        texts = dict.fromkeys(f"{type(error).__name__}: {first_line(error)}" for error in self._failures)
        for text in list(texts)[1:]:
            logger.warning("at the end, too: %s", text)
        if self._failures:
            raise self._failures[0]
