"""The wish to stop a sweep: a file tells the workers, whose trials then end at their next step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from pathlib import Path

GRACE_S = 2.2
"""How long trials may take for it: `ray job stop` kills a driver 3 s after it has asked it to end."""


class Stop:
    """Whether somebody wants to stop."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._asked_at: float | None = None

    def ask(self) -> None:
        """Stop; returns at once."""
        self._asked_at = time.monotonic()
        with contextlib.suppress(OSError):  # a full disk: the trials end without a checkpoint
            self.file.touch()

    @property
    def asked(self) -> bool:
        """True once somebody wants to stop."""
        return self._asked_at is not None

    def over(self, running: Collection[str]) -> bool:
        """True if none of the trials is `running` any more, or they had their time to end."""
        return self._asked_at is not None and (not running or time.monotonic() - self._asked_at > GRACE_S)
