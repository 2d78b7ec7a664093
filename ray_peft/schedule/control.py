"""What a user asks of a running sweep: a trial that runs again, further trials, a pause."""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from ray_peft.checks.inspector import Inspector
from ray_peft.checks.trials import inspect_trials
from ray_peft.errors import DataError, SearchSpaceError
from ray_peft.foundation.audience import Silence
from ray_peft.foundation.regularly import regularly
from ray_peft.foundation.storage import writing
from ray_peft.foundation.whole import write_text
from ray_peft.schedule.decide import Run
from ray_peft.space import read
from ray_peft.spec import TrialSpec
from ray_peft.store.ledger import ADDED, WAY_OUT
from ray_peft.store.progress import Driver, unknown_trial
from ray_peft.store.requests import Answer, serve
from ray_peft.trial import warm
from ray_peft.trial.live import CANCEL_FILE
from ray_peft.trial.result import TrialResult

LOOK_S = 0.3
"""Between two looks for requests, and for the end of a pause."""


class Running(Protocol):
    """The sweep, as far as requests concern it."""

    folder: Path
    proposed: bool
    """Whether a search proposes its trials."""

    def trials(self) -> Mapping[str, TrialSpec]:
        """The trials that it knows, by id."""

    def row(self, trial_id: str) -> TrialResult | None:
        """The row of a trial, if it has one by now."""

    def place(self, trial: TrialSpec) -> Run:
        """What a trial would hold; raises a PlacementError if nothing here can."""

    def note(self, text: str) -> None:
        """Say something, also in the report."""


class Control:
    """Takes the requests of one sweep, in a thread of its own, and holds what they want until it is taken."""

    def __init__(self, running: Running, driver: Driver) -> None:
        self._running, self._driver = running, driver
        self.added: dict[str, TrialSpec] = {}
        """Trials that requests have added, by their id."""
        self._late: deque[Run] = deque()
        self._inspector = Inspector()
        self._actions: dict[str, Callable[[dict[str, Any]], Answer]] = {
            "requeue": self._requeue, "clone": self._clone, "add": self._add, "pause": self._pause,
            "resume": self._resume,
        }  # fmt: skip

    def taking(self) -> AbstractContextManager[None]:
        """Take requests inside."""
        return regularly(lambda: serve(self._running.folder, self._answer), LOOK_S, "control")

    @property
    def paused(self) -> bool:
        """Whether no trial is to run now."""
        return self._driver.paused

    def resumed(self) -> bool:
        """Wait for the end of a pause, if there is one; false if the user interrupted it."""
        with contextlib.suppress(KeyboardInterrupt):
            while self.paused:
                time.sleep(LOOK_S)
        return not self.paused

    def next(self) -> Run | None:
        """A run that a request wants, taken from here; None if there is none."""
        with contextlib.suppress(IndexError):
            return self._late.popleft()
        return None

    def rest(self) -> list[Run]:
        """All of them, taken from here."""
        return list(iter(self.next, None))

    def _answer(self, request: dict[str, Any]) -> Answer:
        action = self._actions.get(request.get("action", ""))
        if action is None:
            raise DataError(f"this sweep's version knows no request {request.get('action')!r}")
        return action(request)

    def _trial(self, trial_id: str) -> TrialSpec:
        trial = self._known().get(trial_id)
        if trial is None:
            raise unknown_trial(self._running.folder, trial_id)
        return trial

    def _known(self) -> dict[str, TrialSpec]:
        return {**self._running.trials(), **self.added}

    def _requeue(self, request: dict[str, Any]) -> Answer:
        self._not_of_a_search()
        trial = self._trial(request["trial"])
        trial_id, row = trial.trial_id, self._running.row(trial.trial_id)
        if row is None or any(spec.trial_id == trial_id for run in self._late for spec in run.trials):
            raise DataError(f"trial {trial_id} waits or runs; once it has ended without finishing, it can be requeued")
        if row.status == "finished":
            raise DataError(f"trial {trial_id} has finished; with other settings: clone {trial_id} --set KEY=VALUE")
        run = self._running.place(trial)
        (self._running.folder / "trials" / trial_id / CANCEL_FILE).unlink(missing_ok=True)
        self._late.append(run)
        return Answer(f"{trial_id}: was {row.status}, runs again", trials=(trial_id,))

    def _clone(self, request: dict[str, Any]) -> Answer:
        trial = self._trial(request["trial"])
        settings = [str(setting) for setting in request["set"]]
        name = f"clone of {trial.trial_id}"
        clone = read.changed(trial.changed({"train.warm_start": None}), settings, name)
        with_settings = f"a {name}" + (f" with {', '.join(settings)}" if settings else "")
        if not request.get("warm"):
            return self._take([clone], f"{with_settings}, from the same start, added while the sweep ran", name)
        self._not_of_a_search()
        warm.check(trial, clone)
        weights = warm.source(
            self._running.folder / "trials" / trial.trial_id, trial, self._running.row(trial.trial_id)
        )
        origin = {"trial": trial.trial_id, "step": weights.step}
        note = (
            f"{with_settings}, warm: from its weights after step {weights.step}, so it is compared with no other trial"
        )
        return self._take([clone.changed({"train.warm_start": origin})], note, name, weights)

    def _add(self, request: dict[str, Any]) -> Answer:
        source = str(request["source"])
        space = read.parse(str(request["text"]), source, request["set"], request["profile"])
        if space.search is not None and space.search.algorithm == "optuna":
            raise SearchSpaceError(f"{source}: its trials are proposed one by one, which needs a sweep of its own")
        return self._take(space.trials, f"from {source}, added while the sweep ran", source)

    def _take(self, trials: list[TrialSpec], note: str, source: str, weights: warm.Source | None = None) -> Answer:
        """Check trials from `source`, keep them for further runs of the sweep, and let them run.

        Args:
            trials: the new ones.
            note: what a report says of them.
            source: names where they are from.
            weights: that they start from; None is the base.
        """
        self._not_of_a_search()
        if any(trial.members() for trial in trials):
            raise SearchSpaceError(f"{source}: an ensemble waits for its members, which needs a sweep of its own")
        checked = inspect_trials(trials, Silence(), self._inspector)
        settled = checked.trials
        known = self._known()
        new = [trial for trial in settled if trial.trial_id not in known]
        if not new:
            raise DataError(f"the sweep has these settings already: {', '.join(trial.trial_id for trial in settled)}")
        runs = [self._running.place(trial) for trial in new]
        if weights is not None:
            for trial in new:
                warm.copy(weights, self._running.folder / "trials" / trial.trial_id)
        keep(self._running.folder, new, note)
        self.added |= {trial.trial_id: trial for trial in new}
        self._late += runs
        for text in (*checked.notes, *(added_note(trial.trial_id, note) for trial in new)):
            self._running.note(text)
        ids = tuple(trial.trial_id for trial in new)
        before = len(settled) - len(new)
        more = f"; {before} of the file's trials were there before" if before else ""
        return Answer(f"{', '.join(ids)}: {'runs' if len(ids) == 1 else 'run'} beside the others{more}", trials=ids)

    def _not_of_a_search(self) -> None:
        if self._running.proposed:
            raise DataError("this sweep's trials are proposed by a search, which would not know of others")

    def _pause(self, request: dict[str, Any]) -> Answer:
        if self.paused:
            raise DataError("the sweep is paused already")
        self._driver.pause(paused=True)
        return Answer("running trials end at their next step with a checkpoint, and go on from there after `resume`")

    def _resume(self, request: dict[str, Any]) -> Answer:
        if not self.paused:
            raise DataError("the sweep is not paused")
        self._driver.pause(paused=False)
        return Answer("the sweep goes on")


def added_note(trial_id: str, note: str) -> str:
    """What a report says of an added trial."""
    return f"added: {trial_id}: {note}"


def keep(folder: Path, trials: list[TrialSpec], note: str) -> None:
    """Remember trials that were added to a sweep: run again, it runs those that did not finish.

    Raises:
        StorageError: the system refuses.
    """
    entries = [*_entries(folder), *({"trial_id": t.trial_id, "spec": t.plain(), "note": note} for t in trials)]
    with writing(folder / ADDED, WAY_OUT):
        write_text(folder / ADDED, json.dumps(entries, ensure_ascii=False, indent=1) + "\n")


def added(folder: Path) -> Iterator[tuple[TrialSpec, str]]:
    """The trials that were added to a sweep in earlier runs, with what a report says of each.

    Raises:
        SearchSpaceError: the file is none of ours.
    """
    path = folder / ADDED
    try:
        for entry in _entries(folder):
            yield TrialSpec.from_plain(entry["spec"]), added_note(entry["trial_id"], entry["note"])
    except (ValueError, TypeError, LookupError) as error:
        raise SearchSpaceError(f"{path}: is no list of added trials ({error}); remove it, or use --fresh") from None


def _entries(folder: Path) -> list[Any]:
    path = folder / ADDED
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []
