"""Several trials on one base in one process: each keeps its own folder, run, row and failure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ray_peft.engine.trained import Report, Trained
from ray_peft.errors import TrackingError, TrialFailed, first_line
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.tasks.base import Bench
from ray_peft.trial import trial
from ray_peft.trial.life import Life, Place, Process, Tracker, evaluate
from ray_peft.trial.result import TrialResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """One trial of a pack."""

    spec: TrialSpec
    place: Place
    """Its own folder, on the device of them all."""
    tracker: Tracker
    progress: Report
    """Called with every logged metric."""


class _Lives:
    """The lives of a pack's trials, in the order of its members, and the rows of those that have ended."""

    def __init__(self, members: Sequence[Member], report: Callable[[TrialResult], None]) -> None:
        self.members, self._report = members, report
        self.rows: list[TrialResult | None] = [None] * len(members)
        device = members[0].place.device
        self.process = Process(device)
        self.lives = [
            Life(member.spec, member.place, member.tracker, member.progress, self.process.of_a_member())
            for member in members
        ]

    @property
    def open(self) -> list[int]:
        """Members without a row."""
        return [number for number, row in enumerate(self.rows) if row is None]

    def start(self) -> None:
        """Open the trackers' runs; a trial whose tracker fails has its row."""
        for number, member in enumerate(self.members):
            try:
                trial.prepare_folder(member.place)
                self.lives[number].run_id = member.tracker.start(member.spec)
            except TrackingError as error:
                row = self.lives[number].failed(error).model_copy(update={"untracked": str(error)})
                self._keep(number, row)

    def end(self, number: int, row: TrialResult) -> None:
        """Record a member's row."""
        member = self.members[number]
        self._keep(number, trial.end(row, member.place, member.tracker))

    def fail(self, error: Exception) -> None:
        """Record the failure of what the members share for all that have no row."""
        for number in self.open:
            row = self.lives[number].failed(error)
            logger.warning("%s: %s: %s", self.members[number].spec.trial_id, row.status, first_line(row.error))
            self.end(number, row)

    def _keep(self, number: int, row: TrialResult) -> None:
        self.rows[number] = row
        self._report(row)


def run_pack(members: Sequence[Member], report: Callable[[TrialResult], None] = lambda row: None) -> list[TrialResult]:
    """Run trials on one base, and record their results, whatever happens.

    A member that fails leaves the pack; the others go on. If loading or a pass fails, which they share, it fails for
    all members that have no row yet.

    Args:
        members: at least one; all of one base and one way to compute (tasks/llm_sft/packable.py).
        report: called with every row as soon as it is recorded.

    Returns:
        The rows, in the members' order.

    Raises:
        KeyboardInterrupt, SystemExit: passed on after all that have no row are recorded as cancelled.
    """
    lives = _Lives(members, report)
    try:
        lives.start()
        if lives.open:
            _run(lives)
    except Exception as error:
        lives.fail(error)
    except BaseException:
        for number in lives.open:
            lives.end(number, lives.lives[number].result("cancelled", error="stopped before the end"))
        raise
    finally:
        lives.process.memory.stop()
        trial.release(members[0].place)
    return [row for row in lives.rows if row is not None]


def _run(lives: _Lives) -> None:
    numbers = lives.open
    place = lives.members[0].place
    trial.take_place(place)
    task = TASKS[lives.members[0].spec.task]
    with lives.process.clock.phase("load"):
        benches = task.load_pack([lives.lives[number].runs for number in numbers], place.device)
    for number, bench in zip(numbers, benches, strict=True):
        trial.loaded(lives.lives[number], bench)
        lives.lives[number].predicted = {}  # of the trial alone, which what is measured here is not
        lives.lives[number].process.clock.seconds["load"] = lives.process.clock.seconds["load"] / len(numbers)
    lives.process.memory.start()

    def ended(order: int, bench: Bench, trained: Trained, error: Exception | None) -> None:
        number = numbers[order]
        life = lives.lives[number]
        shared = f"together with {len(numbers) - 1} other trials: seconds by tokens, memory of all"
        life.trained = replace(trained, passes=f"{trained.passes}, {shared}")
        life.process.clock.seconds["train"] = trained.seconds - life.costs.earlier_s("train")
        try:
            if error is not None:
                raise error
            life.parameters = bench.parameters()
            with life.process.clock.phase("save"):
                trial.save(life, bench)
            with life.process.clock.phase("evaluate"):
                evaluate(life, bench)
            row = life.result("finished")
        except Exception as failure:
            row = life.failed(failure)
            logger.warning("%s: %s: %s", life.spec.trial_id, row.status, first_line(row.error))
        lives.end(number, row)

    folders = [lives.lives[number].place.folder / "stage1" for number in numbers]
    task.train_pack(benches, folders, [lives.lives[number].report for number in numbers], ended)
    if lives.open:
        raise TrialFailed("the pack ended without this trial")
