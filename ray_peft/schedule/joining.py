"""Which trials the process of a pack trains: those of its run that have not moved to another pack, and what joins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ray_peft.schedule.decide import Demand
from ray_peft.schedule.handout import Task, resolver
from ray_peft.schedule.relay import Relay
from ray_peft.spec import TrialSpec


class PackTrials:
    """The trials of one pack, in its process; the driver says what moves (`Events`)."""

    def __init__(self, tasks: Sequence[Task], task: Task, relay: Relay, ask: Callable[[], None]) -> None:
        """Prepare.

        Args:
            tasks: of all runs.
            task: the pack's.
            relay: of all packs.
            ask: asks the driver for a further trial; returns once it has answered.
        """
        self._resolve, self._task, self._relay, self._ask = resolver(tasks), task, relay, ask
        self._joined: set[str] = set()

    def first(self) -> list[tuple[TrialSpec, Demand]]:
        """Those to begin with; of a process that is started again, with what had joined."""
        moved = self._relay.moved()
        trials = [both for both in self._task.trials if both[0].trial_id not in moved]
        while (joining := self._next()) is not None:
            trials.append(joining)
        return trials

    def further(self) -> tuple[TrialSpec, Demand] | None:
        """A further one, if the driver has one."""
        self._ask()
        return self._next()

    def _next(self) -> tuple[TrialSpec, Demand] | None:
        for trial_id, (place, config) in self._relay.moved().items():
            if place == self._task.place and trial_id not in self._joined:
                self._joined.add(trial_id)
                task = self._resolve(config)
                return task.spec, replace(self._task.demand, chosen=task.trials[task.member or 0][1].chosen)
        return None
