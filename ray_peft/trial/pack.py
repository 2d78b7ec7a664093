"""Several trials on one base in one process: each keeps its own folder, run, row and failure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from ray_peft.engine.recovery import answers
from ray_peft.engine.trained import Report, Trained
from ray_peft.errors import RayPeftError, TrackingError, TrialFailed, first_line
from ray_peft.spec import TrialSpec
from ray_peft.tasks import TASKS
from ray_peft.tasks.base import Bench, PackTrial
from ray_peft.trial import trial
from ray_peft.trial.life import Life, Place, Process, Tracker, evaluate
from ray_peft.trial.result import TrialResult

logger = logging.getLogger(__name__)

BESIDE = 2
"""Members whose rows are made at the same time: one waits for its tracker while the other counts words."""


@dataclass(frozen=True)
class Member:
    """One trial of a pack."""

    spec: TrialSpec
    place: Place
    """Its own folder, on the device of them all."""
    tracker: Tracker
    progress: Report
    """Called with every logged metric."""
    verdict: Callable[[int], None] = lambda step: None
    """Waits until a search has compared what the trial has reported of a step."""


class _Lives:
    """The lives of a pack's trials, in the order of its members, and the rows of those that have ended."""

    def __init__(self, members: Sequence[Member], report: Callable[[TrialResult], None]) -> None:
        self.members: list[Member] = []
        self._report = report
        self.rows: list[TrialResult | None] = []
        self.device = members[0].place.device
        self.process = Process(self.device)
        self.lives: list[Life] = []
        for member in members:
            self._add(member)

    def _add(self, member: Member) -> None:
        self.members.append(member)
        self.rows.append(None)
        process = self.process.of_a_member()
        self.lives.append(Life(member.spec, member.place, member.tracker, member.progress, process))

    @property
    def open(self) -> list[int]:
        """Members without a row."""
        return [number for number, row in enumerate(self.rows) if row is None]

    def start(self) -> None:
        """Open the trackers' runs; a trial whose tracker fails has its row."""
        for number in range(len(self.members)):
            self._start(number)

    def _start(self, number: int) -> None:
        member = self.members[number]
        try:
            trial.prepare_folder(member.place)
            self.lives[number].run_id = member.tracker.start(member.spec)
        except TrackingError as error:
            row = self.lives[number].failed(error).model_copy(update={"untracked": str(error)})
            self.keep(number, row)

    def join(self, member: Member, benches: Sequence[Bench]) -> tuple[int, Bench] | None:
        """Start a further member on the base of the others; None if it has its row already, since it failed."""
        self._add(member)
        number = len(self.members) - 1
        self._start(number)
        life = self.lives[number]
        if self.rows[number] is not None:
            return None
        try:
            with life.process.clock.phase("load"):
                bench = TASKS[life.spec.task].join_pack(benches, life.runs)
            trial.loaded(life, bench)
        except Exception as failure:
            self.fail(number, failure)
            return None
        return number, bench

    def begin_again(self, numbers: Sequence[int]) -> None:
        """Let members start over from their last checkpoints; those that have none, from nothing."""
        self.process.memory.stop()
        self.process = Process(self.device)
        for number in numbers:
            self.lives[number].begin_again(self.process.of_a_member())

    def end(self, number: int, row: TrialResult) -> None:
        """Record a member's row."""
        member = self.members[number]
        self.keep(number, trial.end(row, member.place, member.tracker))

    def fail(self, number: int, error: Exception) -> None:
        """Record the row of a member that raised."""
        life = self.lives[number]
        row = life.failed(error)
        logger.warning("%s: %s: %s", life.spec.trial_id, row.status, first_line(row.error))
        self.end(number, row)

    def trial(self, number: int, bench: Bench) -> PackTrial:
        """A member as its task trains it."""
        life = self.lives[number]
        return PackTrial(bench, life.place.folder / "stage1", life.report, partial(self.verdict, number))

    def verdict(self, number: int, step: int) -> None:
        """End a member after a step, if a search wants that.

        Raises:
            TrialStopped, TrialCancelled: it ends.
        """
        self.members[number].verdict(step)
        self.lives[number].check()

    def score(self, number: int, bench: Bench) -> None:
        """Score a member whose adapter is saved, and record its row."""
        life = self.lives[number]
        try:
            with life.process.clock.phase("evaluate"):
                evaluate(life, bench)
            row = life.result("finished")
        except Exception as failure:
            self.fail(number, failure)
        else:
            self.end(number, row)

    def alone(self, number: int) -> None:
        """Run a member by itself."""
        life = self.lives[number]
        life.begin_again(Process(self.device))
        self.keep(number, trial.run_started(life, self.members[number].tracker))

    def keep(self, number: int, row: TrialResult) -> None:
        """Take a member's row, which is recorded."""
        self.rows[number] = row
        self._report(row)


def run_pack(
    members: Sequence[Member],
    report: Callable[[TrialResult], None] = lambda row: None,
    further: Callable[[], Member | None] = lambda: None,
) -> list[TrialResult]:
    """Run trials on one base, and record their results, whatever happens.

    A member that fails leaves; the others go on. Where what they share fails, loading or passes, as where memory runs
    out, those without a row go on from their checkpoints in two smaller packs, one after the other, and at last alone.

    Args:
        members: at least one; all of one base and one way to compute (`TaskType.bases`).
        report: called with every row as soon as it is recorded.
        further: asked for a trial when a member ends before others, which then takes its place.

    Returns:
        The rows, in the members' order; those of further ones come last.

    Raises:
        KeyboardInterrupt, SystemExit: passed on after all that have no row are recorded as cancelled.
        TrialFailed: the device does not answer any more; some have no row.
    """
    lives = _Lives(members, report)
    try:
        lives.start()
        waiting = [lives.open]
        while waiting:
            if numbers := waiting.pop(0):
                waiting = [*_run(lives, numbers, further), *waiting]
    except Exception:  # none of a member's own
        raise
    except BaseException:
        for number in lives.open:
            lives.end(number, lives.lives[number].result("cancelled", error="stopped before the end"))
        raise
    finally:
        lives.process.memory.stop()
        trial.release(members[0].place)
    return [row for row in lives.rows if row is not None]


def _run(lives: _Lives, numbers: list[int], further: Callable[[], Member | None]) -> list[list[int]]:
    """Run members together; returns the packs in which those without a row go on. `numbers` gets those that join.

    Raises:
        TrialFailed: the device does not answer any more.
    """
    if len(numbers) == 1:
        lives.alone(numbers[0])
        return []
    try:
        _train(lives, numbers, further)
        left = [number for number in numbers if number in lives.open]  # they joined, and no place was large enough
        if left:
            lives.begin_again(left)
        return [left]
    except Exception as error:
        failure, alone = f"{type(error).__name__}: {first_line(error)}", isinstance(error, RayPeftError)
        logger.warning("%d trials together: %s", len(numbers), failure)
    if not answers(lives.device):
        raise TrialFailed(failure)
    trial.release(lives.members[0].place)
    left = [number for number in numbers if number in lives.open]
    lives.begin_again(left)
    if alone:  # they cannot share this base at all
        return [[number] for number in left]
    middle = -(-len(left) // 2)
    return [left[:middle], left[middle:]]


def _train(lives: _Lives, numbers: list[int], further: Callable[[], Member | None]) -> None:
    """Train members together, and score each as it ends. `numbers` gets those that join.

    Raises:
        Exception: what they share failed.
    """
    place = lives.members[numbers[0]].place
    trial.take_place(place)
    task, places = TASKS[lives.members[0].spec.task], len(numbers)
    with lives.process.clock.phase("load"):
        benches = task.load_pack([lives.lives[number].runs for number in numbers], place.device)
    for number, bench in zip(numbers, benches, strict=True):
        life = lives.lives[number]
        trial.loaded(life, bench)
        life.pack_size = len(numbers)
        life.process.clock.note("load", lives.process.clock.seconds["load"] / len(numbers))
    lives.process.memory.start()

    # What needs no model is done beside the work of the others: scores of answers, the tracker, files.
    with ThreadPoolExecutor(BESIDE, thread_name_prefix="pack") as beside:
        rows: list[Future[None]] = []

        def ended(
            order: int, bench: Bench, parameters: tuple[int, int], trained: Trained, error: Exception | None
        ) -> None:
            number = numbers[order]
            life = lives.lives[number]
            life.parameters = parameters
            try:
                if error is not None:
                    raise error
                life.trained = replace(trained)
                with life.process.clock.phase("save"):
                    trial.save(life, bench)
            except Exception as failure:
                lives.fail(number, failure)
                return
            if bench.needs_model:
                lives.score(number, bench)
            else:
                rows.append(beside.submit(lives.score, number, bench))

        def join() -> PackTrial | None:
            member = further()
            joined = lives.join(member, benches) if member is not None else None
            if joined is None:
                return None
            number, bench = joined
            lives.lives[number].pack_size = places
            numbers.append(number)
            benches.append(bench)
            return lives.trial(number, bench)

        task.train_pack([lives.trial(*both) for both in zip(numbers, benches, strict=True)], ended, join)
        for row in rows:
            row.result()
    if any(number in lives.open for number in numbers[:places]):
        raise TrialFailed("the pack ended without this trial")
