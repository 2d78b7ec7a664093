"""Tune, which starts trials on the cluster and returns their rows; the only module that imports ray.tune.

Tune gets each planned trial as an index into a list, which the workers look up: with whole specs, Tune would take
quadratic time over a grid. Those that a search proposes or a user adds come with their specs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from ray_peft.errors import ClusterLost
from ray_peft.schedule import watch, worker
from ray_peft.schedule.decide import Demand, Run
from ray_peft.schedule.events import UNBEGUN_FAILURES, Events, Receiver
from ray_peft.schedule.experiment import Experiment
from ray_peft.schedule.handout import Handout, Task, read_handout, resolver, seated, tasks_of, unlisted
from ray_peft.schedule.joining import PackTrials
from ray_peft.schedule.order import Order
from ray_peft.schedule.relay import Relay
from ray_peft.schedule.stop import Stop
from ray_peft.spec import TrialSpec
from ray_peft.trial.result import TrialResult


class _OfThisProcess:
    """Tune pickles what it is given into files that nobody reads here, and gets a blank for what cannot be pickled."""

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        return object, ()

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        return self


@dataclass(frozen=True)
class Work:
    """What a call of Tune runs."""

    runs: Sequence[Run]
    """In the order of starting; empty if a search proposes them."""
    propose: Callable[[], Run | None] | None
    """The next run that a search proposes, None at its end; None where the runs are known."""
    more: Callable[[], Run | None]
    """A run beside the known ones that the user wants by now; None if there is none."""
    paused: Callable[[], bool]
    """Whether the user wants no trial to run for now: `fit` then comes back soon."""
    samples: int
    """Proposals at most."""
    most: int | None
    """Runs at one time; None leaves it to what they hold."""
    members: Mapping[str, TrialResult]
    """Rows of ensembles' members by trial id."""
    judged: bool = False
    """Whether the receiver may end running trials early."""


def quiet() -> None:
    """Set before Ray starts what Tune reads."""
    # Tune's own loggers write every metric to three more files, and its console output draws boxes that some
    # consoles cannot print.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_RESULT_BUFFER_LENGTH", "0")
    # Reports of training steps do not carry the scores that a search improves; the last report does.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")


def fit(work: Work, opened: Experiment, receiver: Receiver) -> bool:
    """Run trials at once on the cluster, until all have a row or the user stops them; true if that is a pause.

    A trial whose worker dies is started again, `resources.max_failures` times at most.

    Args:
        work: the trials with what they hold, or what proposes them.
        opened: where they are kept.
        receiver: receives every event, in this process, from a thread of Tune's.

    Raises:
        ClusterLost: the cluster died.
        KeyboardInterrupt: the user stopped them a second time.
    """
    from ray import tune

    name = f"tune-{os.urandom(4).hex()}"
    folder = opened.ledger.folder / "ray" / name
    folder.mkdir(parents=True, exist_ok=True)
    stop = Stop(folder / "stop")
    settings: dict[str, Any] = {"reuse_actors": True}
    if work.most is not None:
        settings["max_concurrent_trials"] = work.most
    order = Order(work.runs)
    if work.propose is not None:
        settings |= {"search_alg": _searcher(_proposals(work.propose, stop)), "num_samples": work.samples}
    else:
        settings |= {"search_alg": _searcher(_seats(order, stop, work.more)), "num_samples": -1}
    tasks = tasks_of(work.runs)
    resolve = resolver(tasks)
    handout_file = folder / "handout.pickle"
    handout_file.write_bytes(pickle.dumps(Handout(tasks, dict(work.members), work.judged)))
    trainable = _trainable(opened, handout_file, stop.file)
    _tasks[name] = resolve
    tuner = tune.Tuner(
        tune.with_resources(trainable, partial(_resources, name)),
        tune_config=tune.TuneConfig(**settings),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(opened.ledger.folder / "ray"),
            verbose=0,
            callbacks=[_callback(Events(resolve, receiver, order, Relay(folder / "relay"), stop, work.paused))],
            failure_config=tune.FailureConfig(max_failures=UNBEGUN_FAILURES),  # once it begins: its own, see Events
        ),
    )
    # Tune logs a traceback for each lost trial; its reason is in the trial's row and line.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    try:
        with _many_pending() if work.propose is None else contextlib.nullcontext():
            watch.waited(tuner.fit, stop.ask)
    except ClusterLost:
        raise
    except Exception:
        if not stop.asked:
            raise  # else it is `_Stopped`, in what Tune makes of it
    finally:
        del _tasks[name]
        shutil.rmtree(folder, ignore_errors=True)
    return stop.pauses


@contextlib.contextmanager
def _many_pending() -> Iterator[None]:
    """Let many trials wait for resources at once, as those of a grid do: of a search, Tune lets one."""
    name = "TUNE_MAX_PENDING_TRIALS_PG"
    before = os.environ.get(name)
    os.environ[name] = before or "200"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


Suggest: TypeAlias = Callable[[int], dict[str, Any] | Literal["later"] | None]
"""From the number of Tune's trials that have not ended, the configuration of the next one, "later" where there is none
yet, or None at the end."""


def _seats(order: Order, stop: Stop, more: Callable[[], Run | None]) -> Suggest:
    """The trials of an order, those of a pack once it has started, then what the user adds; none after a stop."""

    def suggest(live: int) -> dict[str, Any] | Literal["later"] | None:
        if stop.asked:
            return None
        if order.unseated:
            return order.unseated.popleft()
        seat = order.next()
        if seat is not None:
            return seated(seat)
        run = more()
        if run is not None:
            return unlisted(run)
        return "later" if order.left or live else None

    return suggest


def _proposals(propose: Callable[[], Run | None], stop: Stop) -> Suggest:
    """The trials of a search; none after a stop."""

    def suggest(_: int) -> dict[str, Any] | None:
        run = None if stop.asked else propose()
        return None if run is None else unlisted(run)

    return suggest


def _searcher(suggest: Suggest) -> Any:
    """Tune's side of what gives a trial's configuration."""
    from ray.tune.search import Searcher

    class Suggestions(_OfThisProcess, Searcher):
        def __init__(self) -> None:
            super().__init__()
            self._live: set[str] = set()
            """Ids of Tune's trials that have not ended."""

        def suggest(self, trial_id: str) -> Any:
            config = suggest(len(self._live))
            if config is None:
                return Searcher.FINISHED
            if config == "later":
                return None
            self._live.add(trial_id)
            return config

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            """Rows reach the sweep through the receiver, lost ones too."""
            self._live.discard(trial_id)

        def save(self, checkpoint_path: str) -> None:
            """Rows are the memory of a sweep: what Tune asks for stays empty."""
            Path(checkpoint_path).touch()

        def restore(self, checkpoint_path: str) -> None:
            """There is nothing to restore."""

    return Suggestions()


def _trainable(opened: Experiment, handout_file: Path, stop_file: Path) -> Callable[..., None]:
    """The function that Tune runs for each trial, in a process that it uses again for the next.

    Once `stop_file` is there, trials that run end at their next step, and none begins.
    """
    ledger, store, parent, name = opened.ledger, opened.store, opened.parent_run_id, opened.name

    relay = Relay(handout_file.parent / "relay")

    def trial(config: dict[str, Any]) -> None:
        from ray import tune

        worker.check_shared(ledger.record_file)  # before anything is read of it
        if stop_file.exists():
            return
        handout = read_handout(handout_file)
        task = resolver(handout.tasks)(config)

        def assignment(spec: TrialSpec, demand: Demand) -> worker.Assignment:
            return worker.Assignment(
                spec=spec,
                folder=ledger.trial_folder(spec.trial_id),
                store=store,
                parent_run_id=parent,
                sweep=name,
                demand=demand,
                members=tuple(
                    handout.members[member.trial_id] for member in spec.members() if member.trial_id in handout.members
                ),
                stop_file=stop_file,
                sign=ledger.record_file,
            )

        def report(metrics: Mapping[str, float], step: int) -> None:
            tune.report({"step": step, **metrics})

        if task.member is not None:
            for line in relay.follow(task.spec.trial_id):
                tune.report(line)
                if worker.ROW in line:
                    return
            return
        if task.hosts:
            pack = PackTrials(handout.tasks, task, relay, lambda: tune.report({worker.WANTS: True}))

            def further() -> worker.Assignment | None:
                joining = pack.further()
                return assignment(*joining) if joining is not None else None

            first = [assignment(*both) for both in pack.first()]
            worker.run_together(first, relay, further, judged=handout.judged)
            tune.report({"trials": len(task.trials)})  # Tune prints a line of its own for what never reported
            return
        result = worker.run_single(assignment(*task.trials[0]), report, ledger.folder / "ray")
        tune.report(worker.final_report(result))
        worker.raise_if_broken(result)

    return trial


class _Stopped(Exception):
    """Ends Tune's loop from within: the user stopped it, or the cluster is lost."""


def _callback(events: Events) -> Any:
    """Tune's callback in the driver."""
    from ray import tune

    class Rows(_OfThisProcess, tune.Callback):
        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if events.over:
                raise _Stopped

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            events.start(trial)

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            events.result(trial, result)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            events.complete(trial)

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            events.again(trial)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            events.error(trial)

    return Rows()


_tasks: dict[str, Callable[[Mapping[str, Any]], Task]] = {}
"""A function from a configuration of Tune's to its task, by the name of the call of Tune. Used in the driver only."""


def _resources(name: str, config: dict[str, Any]) -> Any:
    """What Tune holds for a trial; the workers of a multi-worker trial are held by Ray Train."""
    from ray import tune

    task = _tasks[name](config)
    needed = task.demand
    if needed.num_workers > 1 or task.member is not None:
        # What waits for others must not hold what they need: not even a hundredth of a core.
        return tune.PlacementGroupFactory([{"memory": 1}])
    return tune.PlacementGroupFactory([{"GPU": 0, **needed.per_worker()}])
