"""What Tune's trials are for: their configurations, which are places in a list, and the list, which is a file."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ray_peft.schedule.decide import Demand, Run
from ray_peft.schedule.order import Seat
from ray_peft.spec import TrialSpec
from ray_peft.trial.result import TrialResult

TRIAL, MEMBER = "trial", "member"
"""The keys of Tune's configurations: a place in the list of runs, or the text of a run that is not in it; and which
trial of a pack the Tune trial passes on."""


@dataclass(frozen=True)
class Task:
    """What a Tune trial is for."""

    trials: tuple[tuple[TrialSpec, Demand], ...]
    """Of its run, with what the run's process holds."""
    place: int = 0
    """The run's."""
    member: int | None = None
    """The trial of a pack that it passes on; None if it runs its trials."""

    @property
    def specs(self) -> list[TrialSpec]:
        """The trials of its run."""
        return [spec for spec, _ in self.trials]

    @property
    def spec(self) -> TrialSpec:
        """Its trial, of those of a pack that it runs, the first."""
        return self.trials[self.member or 0][0]

    @property
    def demand(self) -> Demand:
        """What its run holds."""
        return self.trials[0][1]

    @property
    def hosts(self) -> bool:
        """Whether it runs trials together, each of which has a Tune trial of its own."""
        return len(self.trials) > 1 and self.member is None


def tasks_of(runs: Sequence[Run]) -> list[Task]:
    """The tasks of runs, by their places."""
    return [Task(tuple((trial, run.demand_of(trial)) for trial in run.trials), place) for place, run in enumerate(runs)]


def seated(seat: Seat) -> dict[str, Any]:
    """The configuration of a seat."""
    place, member = seat
    return {TRIAL: place, MEMBER: member}


def joining(run: Run) -> dict[str, Any]:
    """The configuration that passes on a run that a search proposes, and that joins a pack."""
    return unlisted(run) | {MEMBER: 0}


def unlisted(run: Run) -> dict[str, Any]:
    """The configuration of a run that a search proposes, or that the user adds or repeats."""
    trial = run.trial
    members = [member.trial_id for member in trial.members()]
    settled = {"trial_id": trial.trial_id, "members": members, "spec": trial.plain(), "demand": asdict(run.demand)}
    return {TRIAL: json.dumps(settled)}


def resolver(tasks: Sequence[Task]) -> Callable[[Mapping[str, Any]], Task]:
    """Tune's configuration of a trial -> its spec, under the id that was settled for it, and what it holds."""

    def resolve(config: Mapping[str, Any]) -> Task:
        where = config[TRIAL]
        if isinstance(where, int):
            return replace(tasks[where], member=config.get(MEMBER))
        settled = json.loads(where)
        spec = TrialSpec.from_plain(settled["spec"]).under(settled["trial_id"], settled["members"])
        return Task(((spec, Demand(**settled["demand"])),), member=config.get(MEMBER))

    return resolve


@dataclass(frozen=True)
class Handout:
    """What the workers need of a call of Tune. It is no part of Tune's function, which Tune unpickles for each trial.

    It is a file, and not in Ray's object store: when its node dies, Ray 2.60 silently ends a driver that has put
    something there.
    """

    tasks: list[Task]
    members: dict[str, TrialResult]
    judged: bool
    """Whether the driver compares running trials, and may end them early."""


@cache
def read_handout(path: Path) -> Handout:
    """The file's content, read once by each worker process."""
    handout: Handout = pickle.loads(path.read_bytes())
    return handout
