"""Optuna's proposals for a search space, one trial at a time; earlier rows of the same space are its memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ray_peft.checks.inspector import Inspector
from ray_peft.errors import RayPeftError, first_line
from ray_peft.foundation import dotted
from ray_peft.space.distributions import distributions
from ray_peft.space.read import Space, fill
from ray_peft.spec import TrialSpec, is_local
from ray_peft.store.earlier import Earlier, recall
from ray_peft.trial.result import TrialResult

if TYPE_CHECKING:
    import optuna

PATIENCE = 50
"""Proposals in a row that are repeats or no valid trials; after that, values that were not tried are taken in order."""

MOST_COUNTED = 10_000
"""Combinations of values up to which a space is gone through for one that was not tried."""


@dataclass(frozen=True)
class Range:
    """The values that a setting is drawn from. A draw of a choice is the index of its entry."""

    kind: str
    arguments: list[Any]

    def distribution(self) -> optuna.distributions.BaseDistribution:
        """The same for Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind == "choice":
            return CategoricalDistribution(range(len(self.arguments)))
        low, high = self.arguments
        if self.kind == "randint":
            return IntDistribution(low, high - 1)
        return FloatDistribution(low, high, log=self.kind == "loguniform")

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

    def __init__(self, space: Space, inspector: Inspector, say: Callable[[str], None]) -> None:
        """`say` takes what a user must know: proposals that were passed over, and an end before `search.samples`."""
        assert space.search is not None
        self._space, self._search, self._inspector, self._say = space, space.search, inspector, say
        self._ranges = {key: Range(*how) for key, how in distributions(space.templates[0]).items()}
        self._known: list[tuple[dict[str, Any], TrialResult]] = []
        self._tried: dict[str, TrialResult | None] = {}
        """Trials by id, with their rows if they have one."""
        self._open: dict[str, optuna.Trial] = {}
        self._passed_over: set[str] = set()
        self._rest = self._all_draws()
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
            if row.status != "finished" or len(earlier.finished) == most:
                continue
            for values in itertools.islice(self._draws_of(row), MOST_COUNTED):
                trial = self._trial_of(values)
                recalled = recall([trial], [row], self._inspector) if trial is not None else Earlier()
                if recalled.finished:
                    ((trial_id, known),) = recalled.finished.items()
                    self._known.append((values, known))
                    self._tried |= {trial_id: known, trial.trial_id: known} if trial is not None else {}
                    earlier.trials += recalled.trials
                    earlier.finished |= recalled.finished
                    earlier.renewed += recalled.renewed
                    break
        self._passed_over.clear()
        return earlier

    @cached_property
    def _study(self) -> optuna.Study:
        """Optuna's study, which begins with the rows that earlier runs left."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=self._search.seed + len(self._known)),
            direction="minimize" if self._search.metric == "eval_loss" else "maximize",
        )
        for values, row in self._known:
            if (score := self._score(row)) is not None:
                trial = optuna.trial.create_trial(params=values, distributions=self._distributions, value=score)
                study.add_trial(trial)
        return study

    @cached_property
    def _distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        return {key: where.distribution() for key, where in self._ranges.items()}

    def next(self) -> TrialSpec | None:
        """The next trial, settled; None if all were tried."""
        for _ in range(PATIENCE):
            if (trial := self._fresh()) is not None:
                return trial
        for values in self._rest:
            self._study.enqueue_trial(values)
            if (trial := self._fresh()) is not None:
                return trial
        self.exhausted = True
        distinct = len({id(row) if row is not None else trial for trial, row in self._tried.items()})
        self._say(f"the search ends early: after {distinct} trials it proposes only repeats or no valid trial")
        return None

    def tell_row(self, row: TrialResult) -> None:
        """Take the row of a proposed trial."""
        self._tried[row.trial_id] = row
        if row.trial_id in self._open:
            self._close(self._open.pop(row.trial_id), row)

    def _fresh(self) -> TrialSpec | None:
        """Optuna's next proposal, if it is a valid trial that was not tried."""
        proposal = self._study.ask(self._distributions)
        trial = self._trial_of(proposal.params)
        if trial is None or trial.trial_id in self._tried:
            self._close(proposal, self._tried.get(trial.trial_id) if trial is not None else None)
            return None
        self._tried[trial.trial_id] = None
        self._open[trial.trial_id] = proposal
        return trial

    def _close(self, proposal: optuna.Trial, row: TrialResult | None) -> None:
        from optuna.trial import TrialState

        score = self._score(row) if row is not None and row.status == "finished" else None
        if score is None:
            self._study.tell(proposal, state=TrialState.FAIL)
        else:
            self._study.tell(proposal, score)

    def _score(self, row: TrialResult) -> float | None:
        score: float | None = getattr(row.scores, self._search.metric)
        return score

    def _trial_of(self, draws: Mapping[str, Any]) -> TrialSpec | None:
        """The trial of these draws, settled; None if it is not valid, which the user is told once."""
        values = {key: self._ranges[key].value(draw) for key, draw in draws.items()}
        try:
            return self._inspector.settled(fill(self._space.templates[0], values, self._space.name))
        except RayPeftError as error:
            reason = first_line(str(error))
            if reason not in self._passed_over:
                self._say(f"passed over a proposal that makes no valid trial: {reason}")
            self._passed_over.add(reason)
            return None

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
