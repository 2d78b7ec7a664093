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
        """The phase that is running, or the last one."""
        self._since: float | None = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to phase `name`, also when it raises; the phase around it pauses."""
        outer = self.last if self._since is not None else None
        self._stand_still()
        self.last, self._since = name, time.perf_counter()
        try:
            yield
        finally:
            self._stand_still()
            if outer is not None:
                self.last, self._since = outer, time.perf_counter()

    def _stand_still(self) -> None:
        if self._since is not None:
            passed = time.perf_counter() - self._since
            self.seconds[self.last] = self.seconds.get(self.last, 0.0) + passed
            self._since = None

    def so_far(self) -> dict[str, float]:
        """Seconds by phase, with those of the phase that is running."""
        on = 0.0 if self._since is None else time.perf_counter() - self._since
        return {**self.seconds, self.last: self.seconds.get(self.last, 0.0) + on} if on else dict(self.seconds)

    def note(self, name: str, seconds: float) -> None:
        """Told what a phase has taken so far, which this clock measures itself."""

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._begin


class ShareClock(Clock):
    """Of one of several trials that train together: its share of the seconds that they spend together."""

    def note(self, name: str, seconds: float) -> None:
        """A phase's share so far."""
        self.seconds[name] = max(0.0, seconds)

    def total(self) -> float:
        """Its seconds, of all phases."""
        return sum(self.so_far().values())
