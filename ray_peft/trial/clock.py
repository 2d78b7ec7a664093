"""Wall time of one trial by phase [s]."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Wall seconds by phase."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.last = ""
        """The phase that is on, or that was the last."""
        self._since: float | None = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to phase `name`, also when it raises."""
        begin = time.perf_counter()
        self.last = name
        self._since = begin
        try:
            yield
        finally:
            self._since = None
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def so_far(self) -> dict[str, float]:
        """Seconds by phase, with those of the phase that is on."""
        on = 0.0 if self._since is None else time.perf_counter() - self._since
        return {**self.seconds, self.last: self.seconds.get(self.last, 0.0) + on} if on else dict(self.seconds)

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._begin
