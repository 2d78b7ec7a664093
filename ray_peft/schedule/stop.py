"""The wish to stop a sweep: a file tells the workers, whose trials then end at their next step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from pathlib import Path

GRACE_S = 2.2
"""How long trials may take for it: `ray job stop` kills a driver 3 s after it has asked it to end."""
PAUSE_GRACE_S = 120.0
"""And before a pause, which nobody is in a hurry for: a step on a CPU takes seconds."""


class Stop:
    """Whether somebody wants to stop."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._until: float | None = None
        self.pauses = False
        """Whether the trials go on later in the same sweep."""

    def pause(self) -> None:
        """Stop until the user lets the sweep go on; returns at once."""
        self.pauses = True
        self._stop(PAUSE_GRACE_S)

    def ask(self) -> None:
        """Stop for good; returns at once."""
        self.pauses = False
        self._stop(GRACE_S)

    def _stop(self, grace_s: float) -> None:
        self._until = time.monotonic() + grace_s
        with contextlib.suppress(OSError):  # a full disk: the trials end without a last checkpoint
            self.file.touch()

    @property
    def asked(self) -> bool:
        """True once somebody wants to stop."""
        return self._until is not None

    def over(self, running: Collection[str]) -> bool:
        """True if none of the trials is `running` any more, or they had their time to end."""
        return self._until is not None and (not running or time.monotonic() > self._until)
