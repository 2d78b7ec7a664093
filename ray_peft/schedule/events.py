"""What Tune's events mean for trials: who is told of what, of trials by themselves and of those that train together."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ray_peft.errors import first_line
from ray_peft.schedule import watch, worker
from ray_peft.schedule.decide import Run
from ray_peft.schedule.early import LOSS
from ray_peft.schedule.handout import Task, joining, seated
from ray_peft.schedule.order import Order
from ray_peft.schedule.relay import Relay
from ray_peft.schedule.stop import Stop
from ray_peft.spec import TrialSpec
from ray_peft.trial.result import TrialResult

logger = logging.getLogger(__name__)

RELAY_FAILURES = 20
"""How often the process of a Tune trial that passes reports on is started again: nothing is lost with it."""
UNBEGUN_FAILURES = 20
"""How often a process may die before its trial has begun, as with a node that is lost meanwhile: the same holds."""


class Receiver(Protocol):
    """Receives the events of trials."""

    def begin(self, spec: TrialSpec) -> None:
        """A trial was handed out."""

    def take(self, result: TrialResult) -> None:
        """A row is there."""

    def show(self, spec: TrialSpec, metrics: Mapping[str, Any]) -> None:
        """A running trial reports a step."""

    def again(self, spec: TrialSpec, reason: str) -> None:
        """A worker died, and its trial is started once more."""

    def lose(self, spec: TrialSpec, reason: str) -> None:
        """A worker died for good."""

    def further(self, specs: Sequence[TrialSpec]) -> Run | None:
        """A trial that may join these in the place of one that has ended; None if there is none."""

    def lose_pack(self, specs: Sequence[TrialSpec], reason: str) -> None:
        """The worker of trials that ran together died for good."""


class Events:
    """Tells a receiver of Tune's events; `trial` is Tune's own."""

    def __init__(
        self,
        resolve: Callable[[Mapping[str, Any]], Task],
        receiver: Receiver,
        order: Order,
        relay: Relay,
        stop: Stop,
        paused: Callable[[], bool],
    ) -> None:
        """Prepare.

        Args:
            resolve: a configuration of Tune's to its task.
            receiver: is told.
            order: gives Tune the trials of a pack once it has started.
            relay: of what packs report.
            stop: whether somebody wants to stop.
            paused: whether no trial is to run now, which is a stop of these.
        """
        self.resolve, self._receiver, self._order, self._relay = resolve, receiver, order, relay
        self._stop, self._paused = stop, paused
        self._running: set[str] = set()
        self._joined: dict[int, list[TrialSpec]] = {}
        """Trials that have joined a pack, by its place."""
        self._failed_before: dict[str, int] = {}
        """How often the process of a Tune trial had died when it began for the first time, by Tune's id."""

    @property
    def over(self) -> bool:
        """True if Tune is to end now: somebody wants to stop, and the trials have ended or had their time."""
        if not self._stop.asked and self._paused():
            self._stop.pause()
        return self._stop.over(self._running)

    def start(self, trial: Any) -> None:
        """A Tune trial has its process; also a further time. Once somebody wants to stop, it does not begin."""
        if self._stop.asked:
            return
        task = self.resolve(trial.config)
        if task.member is not None:
            trial.max_failures = RELAY_FAILURES
            return
        unbegun = self._failed_before.setdefault(trial.trial_id, trial.num_failures)
        trial.max_failures = unbegun + task.spec.resources.max_failures
        for spec in self._specs(task):
            self._running.add(spec.trial_id)
            self._receiver.begin(spec)
        self._order.started(task.place)

    def result(self, trial: Any, result: Mapping[str, Any]) -> None:
        """A Tune trial has reported. Tune would end with an error in here, and with it all the other trials."""
        task = self.resolve(trial.config)
        if task.hosts:
            if worker.WANTS in result and not self._stop.asked:
                self._refill(task)
            return
        try:
            if worker.ROW in result:
                trial.max_failures = 0  # what its process does after that is not the trial's
                self._running.discard(task.spec.trial_id)
                row = TrialResult.model_validate_json(result[worker.ROW])
                if row.status != "cancelled" or not self._stop.asked:  # whoever stopped all of them knows why
                    self._receiver.take(row)
            elif "step" in result:
                self._receiver.show(task.spec, result)
                if task.member is not None and LOSS in result:
                    self._relay.judged(task.spec.trial_id, int(result["step"]))
        except Exception as error:
            self._receiver.lose(task.spec, f"its row cannot be kept: {type(error).__name__}: {first_line(error)}")

    def _refill(self, task: Task) -> None:
        """Give a pack a trial of one that has not started, or what the receiver has, in the place of one that ended."""
        specs = self._specs(task)
        try:
            seat = self._order.move(specs)
            if seat is not None:
                config = seated(seat)
            elif (run := self._receiver.further(specs)) is not None:
                config = joining(run)
            else:
                return
            spec = self.resolve(config).spec
            self._joined.setdefault(task.place, []).append(spec)
            self._running.add(spec.trial_id)
            self._receiver.begin(spec)
            self._relay.move(spec.trial_id, task.place, config)
            if seat is None:
                self._order.follow(config)
        except Exception as error:  # Tune would end with it: what has begun and does not run has no row, and runs later
            logger.warning("no trial joins a pack: %s: %s", type(error).__name__, first_line(error))

    def _specs(self, task: Task) -> list[TrialSpec]:
        """The trials of a run: those of a pack without what has joined another one, and with what has joined it."""
        if not task.hosts:
            return task.specs
        own = [spec for member, spec in enumerate(task.specs) if (task.place, member) not in self._order.moved]
        return own + self._joined.get(task.place, [])

    def complete(self, trial: Any) -> None:
        """A Tune trial has ended by itself."""
        task = self.resolve(trial.config)
        if task.hosts:
            self._order.ended(task.place)
            for spec in self._specs(task) if not self._stop.asked else []:
                self._receiver.lose(spec, "the process of its pack ended without its row")
            self._end(task)

    def again(self, trial: Any) -> None:
        """The process of a Tune trial died, and is started once more."""
        task = self.resolve(trial.config)
        for spec in self._specs(task) if task.member is None and self._died_alone() else []:
            self._receiver.again(spec, _reason(trial))

    def error(self, trial: Any) -> None:
        """The process of a Tune trial died for good."""
        task = self.resolve(trial.config)
        alone = task.member is None and self._died_alone()
        if task.member is None:
            self._running.difference_update(spec.trial_id for spec in self._specs(task))
        if task.hosts:
            self._order.ended(task.place)
            if alone:
                self._receiver.lose_pack(self._specs(task), _reason(trial))
            self._end(task)
        elif alone:
            self._receiver.lose(task.spec, _reason(trial))

    def _died_alone(self) -> bool:
        """True if a worker died by itself: not because it was stopped, or with its cluster."""
        return not self._stop.asked and not watch.dies()

    def _end(self, task: Task) -> None:
        for spec in self._specs(task):
            self._relay.end(spec.trial_id)


_DIED = re.compile(r"(?:Worker )?exit detail: ([^\n]+)|(\S*node \S* ?was terminated[^\n]*)", re.I)
"""What Ray says of a worker that died: the last reason counts."""


def _reason(trial: Any) -> str:
    """Why Tune lost a trial that left no row: one line, and the whole error below it."""
    path = getattr(trial, "error_file", None)
    text = Path(path).read_text(encoding="utf-8", errors="replace") if path and Path(path).is_file() else ""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return "the worker ended without leaving an error"
    details = [next(filter(None, groups)) for groups in _DIED.findall(text)]
    line = details[-1] if details else lines[-1].strip()
    return f"the worker died: {line.split('. ')[0]}\n\n{text}"
