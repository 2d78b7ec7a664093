"""Proposals for a search space, one or several at a time; rows of the same space and a journal are its memory."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ray_peft.checks.inspector import Inspector
from ray_peft.errors import RayPeftError, StorageError, first_line
from ray_peft.foundation import dotted
from ray_peft.schedule.study import Draw, Score, Study, driver_of
from ray_peft.space.distributions import distributions
from ray_peft.space.read import Space, fill
from ray_peft.spec import TrialSpec, is_local
from ray_peft.store.earlier import Earlier, recall
from ray_peft.store.ledger import JOURNAL
from ray_peft.trial.result import DONE, TrialResult

PATIENCE = 50
"""Proposals in a row that are repeats or no valid trials; after that, values that were not tried are taken in order."""

MOST_COUNTED = 10_000
"""Combinations of values up to which a space is gone through for one that was not tried."""


@dataclass(frozen=True)
class Range:
    """The values that a setting is drawn from. A draw of a choice is the index of its entry."""

    kind: str
    arguments: list[Any]

    def value(self, draw: Any) -> Any:
        """The value of a draw."""
        return self.arguments[draw] if self.kind == "choice" else draw

    def draws_of(self, value: Any) -> list[Any]:
        """The draws that may have given a value of a finished trial; none if it is outside."""
        if self.kind == "choice":
            return [place for place, entry in enumerate(self.arguments) if _part_of(entry, value)]
        low, high = self.arguments
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            return []
        if self.kind == "randint":
            return [value] if isinstance(value, int) and value < high else []
        return [float(value)]

    def all(self) -> Sequence[int] | None:
        """Every draw; None where there are endlessly many."""
        if self.kind == "choice":
            return range(len(self.arguments))
        return range(*self.arguments) if self.kind == "randint" else None


class Draws:
    """A search: the trials that it has proposed, their results, and its next proposal."""

    def __init__(self, space: Space, inspector: Inspector, say: Callable[[str], None], folder: Path) -> None:
        """Prepare.

        Args:
            space: what is searched.
            inspector: settles trials.
            say: takes what a user must know: proposals that were passed over, and an end before `search.samples`.
            folder: of the results; the journal lies there, unless `search.journal` names another place.
        """
        assert space.search is not None
        self._space, self._search, self._inspector, self._say = space, space.search, inspector, say
        self._folder = folder
        self._minimizes = self._search.metric == "eval_loss"
        self._final_statuses = DONE if self._search.scheduler is not None else {"finished"}
        """The status of rows that need not be made again."""
        self._kinds = distributions(space.templates[0])
        self._ranges = {key: Range(*how) for key, how in self._kinds.items()}
        self._known: dict[str, tuple[dict[str, Any], TrialResult]] = {}
        """Rows with their draws by the ids that their trials have today."""
        self._tried: dict[str, TrialResult | None] = {}
        """Trials of this driver by id, with their rows if they have one."""
        self._open: dict[str, int] = {}
        """Those without a row, with their numbers in the study."""
        self._interrupted: list[Draw] = []
        """Those that were running when an earlier driver of this folder was killed."""
        self._elsewhere: set[str | None] = set()
        """Trials that other drivers run or have finished, by id."""
        self._passed_over: set[str] = set()
        self._rest = self._all_draws()
        self._several = False
        """Whether trials are proposed together: decided by the first proposal."""
        self.exhausted = False
        """True if nothing new could be proposed."""

    def remember(self, rows: Sequence[TrialResult], most: int) -> Earlier:
        """Take the finished rows that are draws of this space: all else equal, and their values within its ranges.

        Args:
            rows: of the folder.
            most: rows to take, the first of them.
        """
        earlier = Earlier()
        for row in rows:
            if row.status not in self._final_statuses or len(earlier.finished) == most:
                continue
            for values in itertools.islice(self._draws_of(row), MOST_COUNTED):
                trial = self._trial_of(values)
                recalled = self._recalled(trial, row)
                if trial is not None and recalled.finished:
                    ((trial_id, known),) = recalled.finished.items()
                    self._known[trial.trial_id] = (values, known)
                    self._tried |= {trial_id: known, trial.trial_id: known}
                    earlier.trials += recalled.trials
                    earlier.finished |= recalled.finished
                    earlier.renewed += recalled.renewed
                    break
        self._passed_over.clear()
        return earlier

    @cached_property
    def _study(self) -> Study:
        """The study, which goes on with what the journal and the rows of earlier runs say."""
        journal = Path(self._search.journal) if self._search.journal is not None else self._folder / JOURNAL
        driver = self._driver
        study = Study(journal, driver, self._kinds)
        with study.exclusive():
            study.open(self._question(), self._id_of, minimize=self._minimizes)
            draws = study.draws()
            for draw in draws:
                if draw.driver != driver or draw.state != "running":
                    continue
                if draw.trial_id in self._known:  # its driver was killed before it could tell
                    score = self._score(self._known[draw.trial_id][1])
                    # One that was stopped is added below: Optuna takes losses on the way from who has asked alone.
                    study.end(draw.number, None if score is not None and score.stopped_at is not None else score)
                else:
                    self._interrupted.append(draw)
            ended = {draw.trial_id for draw in study.draws() if draw.state in ("complete", "pruned")}
            for trial_id, (values, row) in self._known.items():
                if (score := self._score(row)) is not None and trial_id not in ended:
                    study.add(values, trial_id, score)
            study.seed(self._search.seed, shared=self._search.journal is not None, several=self._several)
        return study

    @cached_property
    def _driver(self) -> str:
        return driver_of(self._folder)

    def _question(self) -> str:
        """What a study is about, as a short name."""
        question = [self._space.templates[0], self._search.metric]
        return hashlib.sha256(json.dumps(question, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def next(self) -> TrialSpec | None:
        """The next trial, settled; None if all were tried.

        Raises:
            StorageError: the journal cannot be written.
        """
        with self._study.exclusive():
            self._elsewhere = {
                draw.trial_id for draw in self._study.draws()
                if draw.driver != self._driver and draw.state in ("running", "complete", "pruned")
            }  # fmt: skip
            while self._interrupted:
                draw = self._interrupted.pop(0)
                self._study.end(draw.number, None)
                if (trial := self._fresh(draw.values)) is not None:
                    return trial
            for _ in range(PATIENCE):
                if (trial := self._fresh()) is not None:
                    return trial
            for values in self._rest:
                if self._is_new(self._trial_of(values)) and (trial := self._fresh(values)) is not None:
                    return trial
        self.exhausted = True
        distinct = len({id(row) if row is not None else trial for trial, row in self._tried.items()})
        self._say(f"the search ends early: after {distinct} trials it proposes only repeats or no valid trial")
        return None

    def next_ones(self, most: int) -> list[TrialSpec]:
        """Up to so many trials, settled, which train together; fewer at the end of the search.

        Raises:
            StorageError: the journal cannot be written.
        """
        self._several = True
        trials: list[TrialSpec] = []
        while len(trials) < most and (trial := self.next()) is not None:
            trials.append(trial)
        return trials

    def tell_row(self, row: TrialResult) -> None:
        """Take the row of a proposed trial."""
        self._tried[row.trial_id] = row
        if row.trial_id in self._open:
            with contextlib.suppress(StorageError):  # the next start finds the row
                self._study.end(self._open.pop(row.trial_id), self._score(row))

    def _fresh(self, values: Mapping[str, Any] | None = None) -> TrialSpec | None:
        """The trial of the study's next proposal, or of `values`; None if it is not valid, or was tried."""
        number, draws = self._study.ask(values)
        trial = self._trial_of(draws)
        if trial is None:
            self._study.prune(number)
            return None
        if not self._is_new(trial):
            self._study.end(number, self._score(self._tried.get(trial.trial_id)))
            return None
        self._study.begin(number, trial.trial_id)
        self._tried[trial.trial_id] = None
        self._open[trial.trial_id] = number
        return trial

    def _is_new(self, trial: TrialSpec | None) -> bool:
        """True for a valid trial that neither this driver nor another has run or is running."""
        return trial is not None and trial.trial_id not in self._tried and trial.trial_id not in self._elsewhere

    def _score(self, row: TrialResult | None) -> Score | None:
        """What a study learns of a row; None if there is none, or if its trial was not done."""
        if row is not None and row.status == "stopped_early":
            loss = row.eval_loss_best
            return None if loss is None else Score(loss if self._minimizes else -loss, row.steps)
        if row is None or row.status != "finished":
            return None
        value: float | None = getattr(row.scores, self._search.metric)
        return None if value is None else Score(value)

    def _recalled(self, trial: TrialSpec | None, row: TrialResult) -> Earlier:
        """The row, if it answers the trial."""
        if trial is None:
            return Earlier()
        return recall([trial], [row], self._inspector, stopped=self._search.scheduler is not None)

    def _trial_of(self, draws: Mapping[str, Any]) -> TrialSpec | None:
        """The trial of these draws, settled; None if it is not valid, which the user is told once."""
        try:
            return self._settled(draws)
        except RayPeftError as error:
            reason = first_line(str(error))
            if reason not in self._passed_over:
                self._say(f"passed over a proposal that makes no valid trial: {reason}")
            self._passed_over.add(reason)
            return None

    def _id_of(self, draws: Mapping[str, Any]) -> str | None:
        """The id of the trial of these draws; None if it is not valid."""
        try:
            return self._settled(draws).trial_id
        except RayPeftError:
            return None

    def _settled(self, draws: Mapping[str, Any]) -> TrialSpec:
        values = {key: self._ranges[key].value(draw) for key, draw in draws.items()}
        return self._inspector.settled(fill(self._space.templates[0], values, self._space.name))

    def _draws_of(self, row: TrialResult) -> Iterator[dict[str, Any]]:
        """The draws that may have made a finished trial; none if one of its values is outside the ranges."""
        plain = row.spec.plain()
        draws_by_range = []
        for key, where in self._ranges.items():
            draws_by_range.append(where.draws_of(dotted.get(plain, key)))
        for draws in itertools.product(*draws_by_range):
            yield dict(zip(self._ranges, draws, strict=True))

    def _all_draws(self) -> Iterator[dict[str, Any]]:
        """Every combination of draws, once, where there are not too many to go through."""
        draws_by_range = [draws for where in self._ranges.values() if (draws := where.all()) is not None]
        if len(draws_by_range) == len(self._ranges) and math.prod(map(len, draws_by_range)) <= MOST_COUNTED:
            for draws in itertools.product(*draws_by_range):
                yield dict(zip(self._ranges, draws, strict=True))


def _part_of(entry: Any, value: Any) -> bool:
    """True if a finished trial's value may be what an entry of a choice became: with defaults, and absolute paths."""
    if isinstance(entry, dict):
        return isinstance(value, dict) and all(
            key in value and _part_of(part, value[key]) for key, part in entry.items()
        )
    if isinstance(entry, list) and isinstance(value, list):
        return len(entry) == len(value) and all(map(_part_of, entry, value))
    if isinstance(entry, str) and isinstance(value, str) and is_local(entry):
        return True  # its content decides
    return bool(entry == value)
