"""The order in which Tune is given the trials of a plan, some of which may train together.

Those that do run in one process, which a Tune trial of its own holds: the host. Each of them is a Tune trial, too,
which holds nothing and passes on what the host reports of it. These are given to Tune once their host has started, so
that none waits in a process while its pack waits for a GPU. When a trial ends before the others of its pack, one of a
pack that has not started may take its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from ray_peft.schedule.decide import Run
from ray_peft.schedule.packs import may_join
from ray_peft.spec import TrialSpec

Seat = tuple[int, int | None]
"""A run by its place, and which of its trials is passed on; None for what holds the run's resources."""


class Order:
    """Seats in the order of starting."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._trials = [run.trials for run in runs]
        self._runs = deque(range(len(runs)))
        self._waiting = {place: len(run.trials) for place, run in enumerate(runs) if run.is_pack}
        """Trials of packs whose hosts have not started."""
        self._ready: deque[Seat] = deque()
        self.unseated: deque[dict[str, Any]] = deque()
        """Configurations of trials that a search has proposed, and that have joined a pack."""
        self.moved: set[Seat] = set()
        """Trials that have joined another pack than their own."""

    def follow(self, config: dict[str, Any]) -> None:
        """Give Tune a configuration that is no seat next."""
        self.unseated.append(config)

    @property
    def left(self) -> bool:
        """Whether there is a seat to come."""
        return bool(self._runs or self._waiting or self._ready or self.unseated)

    def next(self) -> Seat | None:
        """The next seat; None if there is none, or none yet."""
        if self._ready:
            return self._ready.popleft()
        return (self._runs.popleft(), None) if self._runs else None

    def started(self, place: int) -> None:
        """A run has its process: its trials follow, the first time."""
        seats = [(place, member) for member in range(self._waiting.pop(place, 0))]
        self._ready += [seat for seat in seats if seat not in self.moved]

    def move(self, trials: Sequence[TrialSpec]) -> Seat | None:
        """Take a trial, whose seat follows, out of a pack that has not started, to join `trials`; None if none may."""
        for place in sorted(self._waiting, reverse=True):
            for member, trial in reversed(list(enumerate(self._trials[place]))):
                if (place, member) not in self.moved and may_join(trial, trials):
                    self.moved.add((place, member))
                    self._ready.append((place, member))
                    return place, member
        return None

    def ended(self, place: int) -> None:
        """A run is over: none of its trials follows any more."""
        self._waiting.pop(place, None)
        self._ready = deque(seat for seat in self._ready if seat[0] != place)
