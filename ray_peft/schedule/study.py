"""Optuna's study of a search in a journal: a file that survives kills, and that several drivers may share.

A proposal is in the journal before anybody runs it, with the trial that it makes and the driver that runs it. So a
driver that was killed knows which of its trials were running, and no driver runs what another one runs or has run.
"""

from __future__ import annotations

import contextlib
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from ray_peft.errors import StorageError, first_line
from ray_peft.foundation.json_lines import drop_torn_line
from ray_peft.foundation.locks import locked
from ray_peft.foundation.whole import write_text

if TYPE_CHECKING:
    import optuna

LOCK_WAIT_S = 60.0
"""How long another driver may take for one proposal."""

_RUN = "ray_peft"
"""The attribute of a proposal that holds its trial and its driver."""


@dataclass(frozen=True)
class Draw:
    """The values of one proposal."""

    number: int
    """In the study."""
    values: Mapping[str, Any]
    """By dotted key; of a choice, the index of the entry."""
    trial_id: str | None
    """The trial that they make; None if it is not valid, or not known yet."""
    driver: str | None
    state: Literal["complete", "running", "pruned", "fail", "waiting"]


@dataclass(frozen=True)
class Score:
    """What a study learns of a trial."""

    value: float
    stopped_at: int | None = None
    """The step at which it was stopped early, with `value` until then; None if it finished. Optuna calls it pruned, and
    ranks it below those that went further."""


class Study:
    """The draws of one search space, by this driver and by others."""

    def __init__(self, journal: Path, driver: str, kinds: Mapping[str, tuple[str, list[Any]]]) -> None:
        """Prepare.

        Args:
            journal: made by `open`, if it is not there.
            driver: tells this driver's trials apart from those of others.
            kinds: of every setting that is drawn, by its dotted key: a distribution's kind and arguments.
        """
        self._journal, self._driver = journal, driver
        self._distributions = {key: _distribution(*how) for key, how in kinds.items()}
        self._proposals: dict[int, optuna.Trial] = {}
        """By number."""
        self._holds = 0

    def open(self, name: str, trial_id_of: Callable[[Mapping[str, Any]], str | None], *, minimize: bool) -> None:
        """Go on with the study of this name, or begin it.

        Draws that make other trials today, since the content of files changed, belong to another question: then a
        study of the same name with the next number is taken.

        Args:
            name: of the question: the search space and its metric.
            trial_id_of: the trial that values make today; None if it is not valid.
            minimize: the score is to become small.

        Raises:
            StorageError: the journal cannot be read or written.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with self.exclusive():
            try:
                storage = optuna.storages.JournalStorage(_backend(self._journal, self))
                for number in count(1):
                    self._study = optuna.create_study(
                        storage=storage,
                        study_name=f"{name}-{number}",
                        direction="minimize" if minimize else "maximize",
                        load_if_exists=True,
                    )
                    if all(draw.trial_id in (None, trial_id_of(draw.values)) for draw in self.draws()):
                        break
            except OSError:
                raise
            except Exception as error:  # Optuna raises unrelated types for a file that is no journal
                raise StorageError(
                    f"{self._journal}: is no journal of a search ({type(error).__name__}: {first_line(error)}); move "
                    "it away: a sweep's finished trials stand in its results.jsonl as well"
                ) from None

    def seed(self, seed: int, *, shared: bool, several: bool) -> None:
        """Seed the proposals.

        Args:
            seed: the user's.
            shared: several drivers propose at once, and should not all begin with the same values.
            several: trials are proposed before those before them have rows: these then count as bad ones, so that the
                next ones lie elsewhere.
        """
        import optuna

        own = zlib.crc32(self._driver.encode()) if shared else 0
        self._study.sampler = optuna.samplers.TPESampler(
            seed=(seed + own + len(self.draws())) % 2**32, constant_liar=several
        )

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other drivers from proposing; may be entered again inside.

        Raises:
            StorageError: the journal cannot be written, or another driver holds it for too long.
        """
        try:
            with contextlib.ExitStack() as stack:
                if not self._holds:
                    self._journal.parent.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(locked(self._journal.with_name(f"{self._journal.name}.lock"), LOCK_WAIT_S))
                    drop_torn_line(self._journal)  # Optuna would read no line after one
                self._holds += 1
                try:
                    yield
                finally:
                    self._holds -= 1
        except OSError as error:
            raise StorageError(f"{self._journal}: cannot be used: {error.strerror or error}") from error

    def draws(self) -> list[Draw]:
        """All that were proposed, by any driver."""
        drawn = []
        for trial in self._study.get_trials(deepcopy=False):
            trial_id, driver = trial.user_attrs.get(_RUN, (None, None))
            values = trial.params or dict(trial.system_attrs.get("fixed_params", {}))
            drawn.append(Draw(trial.number, values, trial_id, driver, cast(Any, trial.state.name.lower())))
        return drawn

    def ask(self, values: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """The next proposal: its number and values; `values` if they are given."""
        if values is not None:
            self._study.enqueue_trial(dict(values))
        proposal = self._study.ask(self._distributions)
        self._proposals[proposal.number] = proposal
        return proposal.number, proposal.params

    def begin(self, number: int, trial_id: str) -> None:
        """This driver runs what was asked for."""
        self._proposals[number].set_user_attr(_RUN, [trial_id, self._driver])

    def end(self, number: int, score: Score | None) -> None:
        """A proposal has its score; None if there is none to learn from."""
        if score is None:
            self._study.tell(number, state=self._states.FAIL, skip_if_finished=True)
        elif score.stopped_at is None:
            self._study.tell(number, score.value, skip_if_finished=True)
        else:
            self._proposals[number].report(score.value, score.stopped_at)
            self._study.tell(number, state=self._states.PRUNED, skip_if_finished=True)

    def prune(self, number: int) -> None:
        """A proposal is no valid trial: the next ones keep away from it."""
        self._study.tell(number, state=self._states.PRUNED)

    def add(self, values: Mapping[str, Any], trial_id: str, score: Score) -> None:
        """A trial of this driver that the study does not have."""
        from optuna.trial import create_trial

        run = {_RUN: [trial_id, self._driver]}
        stopped = score.stopped_at
        self._study.add_trial(
            create_trial(
                params=dict(values),
                distributions=self._distributions,
                state=self._states.COMPLETE if stopped is None else self._states.PRUNED,
                value=score.value if stopped is None else None,
                intermediate_values={} if stopped is None else {stopped: score.value},
                user_attrs=run,
            )
        )

    @property
    def _states(self) -> type[optuna.trial.TrialState]:
        from optuna.trial import TrialState

        return TrialState


def driver_of(folder: Path) -> str:
    """The name of the drivers of an output folder, which it keeps."""
    file = folder / ".driver"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, uuid.uuid4().hex)
    return file.read_text(encoding="utf-8")


def _distribution(kind: str, arguments: list[Any]) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if kind == "choice":
        return CategoricalDistribution(range(len(arguments)))
    low, high = arguments
    if kind == "randint":
        return IntDistribution(low, high - 1)
    return FloatDistribution(low, high, log=kind == "loguniform")


def _backend(journal: Path, study: Study) -> Any:
    """Optuna's file, under our own lock: the system frees it when its holder is killed, Optuna's own stays for 30 s."""
    from optuna.storages.journal import JournalFileBackend

    class Lock:
        def acquire(self) -> bool:
            self._stack = contextlib.ExitStack()
            self._stack.enter_context(study.exclusive())
            return True

        def release(self) -> None:
            self._stack.close()

    return JournalFileBackend(str(journal), cast(Any, Lock()))
