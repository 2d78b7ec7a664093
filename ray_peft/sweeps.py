"""A search space -> trials at once on the cluster -> rows; the only module that imports ray.tune."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray_peft import cluster, experiment, worker
from ray_peft.allotment import Allotment
from ray_peft.console import Console, bar
from ray_peft.distributions import distributions
from ray_peft.errors import SearchSpaceError, first_line
from ray_peft.experiment import Experiment
from ray_peft.ledger import Ledger
from ray_peft.placement import Demand, Node, concurrent_trials, demand
from ray_peft.report.plain import trial_line
from ray_peft.result import TrialResult
from ray_peft.signals import callers_signals
from ray_peft.space import Space, fill, load
from ray_peft.spec import TrialSpec


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep leaves behind."""

    folder: Path
    results: list[TrialResult]
    """Rows of the planned trials that have one, in the order of the plan."""
    planned: int
    interrupted: bool
    """True if the user stopped it; the same call goes on with what is missing."""
    tracking_uri: str
    """Without credentials."""

    @property
    def complete(self) -> bool:
        """True if every planned trial finished, and the tracking store has them all."""
        return not self.interrupted and all(row.status == "finished" and row.untracked is None for row in self.results)


def sweep(
    space: Space | str | Path,
    *,
    out: str | Path | None = None,
    address: str | None = None,
    tracking_uri: str | None = None,
    overrides: list[str] | None = None,
    profile: str | None = None,
    fresh: bool = False,
    gpu_memory_gib: float | None = None,
    console: Console | None = None,
) -> SweepOutcome:
    """Run every trial of a search space that has no finished row in `out` yet.

    Args:
        space: a search space or its file.
        out: folder for results; null is `outputs/<name of the space>`.
        address: Ray cluster to join; null starts a local one.
        tracking_uri: MLflow store; null as in `experiment.tracking_uri`.
        overrides: `key.path=value` settings that replace those of the file.
        profile: a profile of the search space, whose settings come before `overrides`.
        fresh: run finished trials again; their earlier rows are kept under another name.
        gpu_memory_gib: what a trial may take of a GPU, to see whether it fits a smaller one; null is all of it.
        console: where progress is written; null is silent.

    Raises:
        RayPeftError: a wrong search space, missing data or model, a store or cluster out of reach. Nothing was started.
    """
    console = console or Console(quiet=True)
    if isinstance(space, Space):
        source = None
    else:
        source = Path(space)
        space = load(space, overrides, profile)
    ledger = Ledger(Path(out) if out else experiment.outputs_folder() / space.name)
    notes = [f"profile: {space.profile}"] if space.profile is not None else []
    notes += [f"limit: every trial was held to {gpu_memory_gib:g} GiB of a GPU"] if gpu_memory_gib is not None else []
    notes += experiment.inspect_trials(space.trials, console)
    uri = experiment.tracking_uri(tracking_uri, space.tracking)
    store = experiment.open_store(uri, space.tracking.experiment or space.name)
    with ledger.locked(), callers_signals(), contextlib.ExitStack() as ray:
        plan = _plan(space, {} if fresh else ledger.finished())
        console.say(f"{space.name}: {plan.total} trials, {plan.total - plan.missing} finished before")
        nodes: list[Node] = []
        allotment = Allotment(nodes, gpu_memory_gib)
        if plan.missing:
            _quiet_tune()
            nodes = ray.enter_context(cluster.connect(address))
            allotment = Allotment(nodes, gpu_memory_gib)
            for trial in plan.trials:
                demand(trial, nodes)  # a trial that can never run here, before the others start
            plan = replace(plan, todo=allotment.prepare(plan.todo, console))
        if fresh:
            ledger.set_aside()
        opened = experiment.open_experiment(
            space.name,
            space.description,
            ledger,
            store=store,
            planned=[] if plan.searched else [trial.trial_id for trial in plan.trials],
            notes=notes,
            console=console,
            source=source.read_text(encoding="utf-8") if source else None,
            report=space.report,
        )
        interrupted = False
        try:
            if plan.missing:
                interrupted = _Sweep(space, plan, opened, allotment).run(nodes, ray.close)
        except BaseException:
            opened.finish(opened.record.planned, interrupted=True)
            raise
        results = opened.finish(opened.record.planned, interrupted)
    return SweepOutcome(ledger.folder, results, plan.total, interrupted, opened.record.tracking_uri)


def _quiet_tune() -> None:
    """Set before Ray starts what Tune reads."""
    # Tune's own loggers write every metric to three more files, and its console output draws boxes that some
    # consoles cannot print.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_RESULT_BUFFER_LENGTH", "0")
    # Reports of training steps do not carry the scores that a search improves; the last report does.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")


@dataclass(frozen=True)
class _Plan:
    trials: list[TrialSpec]
    todo: list[TrialSpec]
    searched: bool
    """True if Tune proposes the trials one by one."""
    finished: list[TrialResult]
    total: int
    """Trials that the sweep is to end with."""

    @property
    def missing(self) -> int:
        return self.total - len(self.finished) if self.searched else len(self.todo)


def _plan(space: Space, finished: dict[str, TrialResult]) -> _Plan:
    searched = space.search is not None and space.search.algorithm == "optuna"
    todo = [trial for trial in space.trials if trial.trial_id not in finished]
    ids = {trial.trial_id for trial in space.trials}
    relevant = [result for trial, result in finished.items() if searched or trial in ids]
    total = space.search.samples if searched and space.search is not None else len(space.trials)
    return _Plan(space.trials, todo, searched, relevant[:total], total)


class _Sweep:
    """One call of Tune: hands specs out, takes rows in."""

    def __init__(self, space: Space, plan: _Plan, opened: Experiment, allotment: Allotment) -> None:
        self.space = space
        self.allotment = allotment
        self.plan = plan
        self.opened = opened
        self.console = opened.console
        self.rows: dict[str, TrialResult] = {result.trial_id: result for result in plan.finished}
        self.started: dict[str, TrialSpec] = {}
        """Trials that Tune has handed out, by their id."""
        self.handed_out = 0
        """Proposals of a search, with repeats."""

    def run(self, nodes: list[Node], leave: Callable[[], None]) -> bool:
        """Run the missing trials and `leave` the cluster; true if the user interrupted them."""
        try:
            known = self.plan.todo or self.plan.trials
            demands = [self.allotment.demand(trial) for trial in known]
            self.console.say(_placement_line(nodes, demands, self.plan.missing))
            for trials in self._phases():
                self._fit(trials, nodes)
                again = [] if self._interrupted(trials) else self._too_small(trials)
                if again:
                    self._fit(again, nodes)
                if self._interrupted(trials):
                    break
        finally:
            try:
                leave()  # no worker may still write to the runs that are closed here
            finally:  # also after a second Ctrl-C
                lost = [trial for trial in self.started.values() if trial.trial_id not in self.rows]
                for trial in lost:
                    self.opened.rows.add(self.opened.lost(trial, "cancelled", "interrupted before the end"))
        return bool(lost) or self._interrupted([] if self.plan.searched else self.plan.todo)

    def _phases(self) -> list[list[TrialSpec]]:
        """The missing trials: those of several workers, the others, and ensembles after what they are made of."""
        if self.plan.searched:
            return [[]]
        several = [trial for trial in self.plan.todo if trial.resources.num_workers > 1]
        ensembles = [trial for trial in self.plan.todo if trial.members()]
        others = [trial for trial in self.plan.todo if trial not in several and trial not in ensembles]
        return [trials for trials in (several, others, ensembles) if trials]

    def _too_small(self, trials: list[TrialSpec]) -> list[TrialSpec]:
        """Trials that ran out of the share of a GPU that was predicted for them: they run once more, alone."""
        found = []
        for trial in trials or list(self.started.values()):
            row, held = self.rows.get(trial.trial_id), self.allotment.demand(trial)
            shared = trial.resources.gpus_per_worker is None and 0 < held.gpus_per_worker < 1
            if row is not None and row.status == "out_of_memory" and shared:
                self.console.say(f"{trial.trial_id} ran out of its share of a GPU; once more, alone")
                self.allotment.demand(trial, alone=True)
                del self.rows[trial.trial_id]
                found.append(trial)
        return found

    def _interrupted(self, trials: list[TrialSpec]) -> bool:
        """True if Tune came back before all of them, or all proposals, had a row: the user stopped it."""
        few = self.plan.searched and self.handed_out < self.plan.missing
        return few or any(trial.trial_id not in self.rows for trial in trials or self.started.values())

    def _fit(self, trials: list[TrialSpec], nodes: list[Node]) -> None:
        """Run trials at once; what a search proposes, if there are none."""
        from ray import tune

        held = [self.allotment.demand(trial) for trial in trials or self.plan.trials]
        several = [each for each in held if each.num_workers > 1]
        settings: dict[str, Any] = {"reuse_actors": True}
        if several:
            settings["max_concurrent_trials"] = concurrent_trials(several, nodes)
        if not trials:
            space: dict[str, Any] = {key: _domain(*how) for key, how in distributions(self.space.templates[0]).items()}
            settings |= {"search_alg": self._optuna(), "num_samples": self.plan.missing}
        else:
            space = {"spec": tune.grid_search([trial.plain() for trial in trials])}
        tuner = tune.Tuner(
            tune.with_resources(self._trainable(trials), _resources(self.space, self.allotment)),
            param_space=space,
            tune_config=tune.TuneConfig(**settings),
            run_config=tune.RunConfig(
                name=f"tune-{os.urandom(4).hex()}",
                storage_path=str(self.opened.ledger.folder / "ray"),
                verbose=0,
                callbacks=[_callback(self)],
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        # Tune logs a traceback for each failed trial; its reason is in the trial's row and line.
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
        with _own_sigint():
            tuner.fit()

    def _trainable(self, trials: list[TrialSpec]) -> Callable[[dict[str, Any]], None]:
        """The function that Tune runs for each trial, in a process that it uses again for the next."""
        ledger, store, parent = self.opened.ledger, self.opened.store, self.opened.parent_run_id
        name, resolve = self.opened.name, _resolver(self.space)
        allotment = self.allotment
        wanted = {member.trial_id for trial in trials for member in trial.members()}
        rows = {trial_id: row for trial_id, row in self.rows.items() if trial_id in wanted}

        def trial(config: dict[str, Any]) -> None:
            from ray import tune

            spec = resolve(config)
            assignment = worker.Assignment(
                spec=spec,
                folder=ledger.trial_folder(spec.trial_id),
                store=store,
                parent_run_id=parent,
                sweep=name,
                demand=allotment.demand(spec),
                members=tuple(rows[each.trial_id] for each in spec.members() if each.trial_id in rows),
            )

            def report(metrics: Mapping[str, float], step: int) -> None:
                tune.report({"step": step, **metrics})

            if assignment.demand.num_workers > 1:
                result: TrialResult | None = worker.run_in_trainer(assignment, ledger.folder / "ray")
            else:
                result = worker.run_here(assignment, report)
            assert result is not None
            tune.report(worker.final_report(result))
            worker.raise_if_broken(result)

        return trial

    def _optuna(self) -> Any:
        """Optuna's search, told of the rows that an interrupted sweep left."""
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        search = self.space.search
        assert search is not None
        keys = list(distributions(self.space.templates[0]))
        known = [(_values(row.spec.plain(), keys), getattr(row.scores, search.metric)) for row in self.plan.finished]
        known = [(values, score) for values, score in known if score is not None]
        metric = search.metric

        class Search(OptunaSearch):
            """Passes over reports of training steps, which Ray 2.60's OptunaSearch would fail on."""

            def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
                if metric in result and worker.ROW in result:
                    super().on_trial_result(trial_id, result)

        return Search(
            sampler=optuna.samplers.TPESampler(seed=search.seed + len(known)),
            metric=search.metric,
            mode="min" if search.metric == "eval_loss" else "max",
            points_to_evaluate=[values for values, _ in known] or None,
            evaluated_rewards=[score for _, score in known] or None,
        )

    def take(self, result: TrialResult) -> None:
        """Keep a trial's row as soon as it is there."""
        if result.trial_id in self.rows:
            return
        self.rows[result.trial_id] = result
        self.opened.rows.add(result)
        self.console.say(trial_line(result, len(self.rows), self.plan.total))

    def show(self, spec: TrialSpec, metrics: Mapping[str, Any]) -> None:
        """Show where a running trial is."""
        loss = next((f"{name} {metrics[name]:.3f}" for name in ("train_loss", "eval_loss") if name in metrics), "")
        done, total = len(self.rows), self.plan.total
        self.console.progress(f"{bar(done, total)} {done}/{total} {spec.trial_id}: step {metrics.get('step')} {loss}")


def _callback(owner: _Sweep) -> Any:
    """Tune's callback in the driver."""
    from ray import tune

    resolve = _resolver(owner.space)

    class Rows(tune.Callback):
        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            spec = resolve(trial.config)
            owner.started[spec.trial_id] = spec
            owner.handed_out += "spec" not in trial.config  # else it was planned, or runs once more

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            # Tune ends with an error in here, and with it all the other trials.
            spec = resolve(trial.config)
            try:
                if worker.ROW in result:
                    owner.take(TrialResult.model_validate_json(result[worker.ROW]))
                else:
                    owner.show(spec, result)
            except Exception as error:
                reason = f"its row cannot be kept: {type(error).__name__}: {first_line(error)}"
                owner.take(owner.opened.lost(spec, "failed", reason))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            spec = resolve(trial.config)
            if spec.trial_id not in owner.rows:
                owner.take(owner.opened.lost(spec, "failed", _reason(trial)))

    return Rows()


@contextlib.contextmanager
def _own_sigint() -> Iterator[None]:
    """Keep the caller's answer to Ctrl-C: Tune leaves its own in place, which stops nothing once it has come back."""
    own = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, own)


def _reason(trial: Any) -> str:
    """Why Tune lost a trial that left no row: the last line of its error, which names the exception."""
    path = getattr(trial, "error_file", None)
    text = Path(path).read_text(encoding="utf-8", errors="replace") if path and Path(path).is_file() else ""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return f"the worker died: {lines[-1].strip()}\n\n{text}" if lines else "the worker died without a word"


def _resolver(space: Space) -> Callable[[Mapping[str, Any]], TrialSpec]:
    """Tune's configuration of a trial -> its spec."""
    template, name = space.templates[0], space.name

    def resolve(config: Mapping[str, Any]) -> TrialSpec:
        return TrialSpec.from_plain(config["spec"]) if "spec" in config else fill(template, dict(config), name)

    return resolve


def _resources(space: Space, allotment: Allotment) -> Callable[[dict[str, Any]], Any]:
    """What Tune holds for a trial; the workers of a multi-worker trial are held by Ray Train."""
    resolve = _resolver(space)

    def resources(config: dict[str, Any]) -> Any:
        from ray import tune

        needed = allotment.demand(resolve(config))
        if needed.num_workers > 1:
            # The driver that waits for the workers must not hold what they need: not even a hundredth of a core.
            return tune.PlacementGroupFactory([{"memory": 1}])
        return tune.PlacementGroupFactory([{"CPU": needed.cpus_per_worker, "GPU": needed.gpus_per_worker}])

    return resources


def _domain(kind: str, arguments: list[Any]) -> Any:
    from ray import tune

    return tune.choice(arguments) if kind == "choice" else getattr(tune, kind)(*arguments)


def _values(plain: Any, keys: list[str]) -> dict[str, Any]:
    """The values at dotted keys."""
    found = {}
    for key in keys:
        value = plain
        for part in key.split("."):
            value = value[part]
        found[key] = value
    return found


def _placement_line(nodes: list[Node], demands: list[Demand], missing: int) -> str:
    gpus, cpus = sum(node.gpus for node in nodes), sum(node.cpus for node in nodes)
    kinds = sorted({(each.num_workers, each.gpus_per_worker, each.cpus_per_worker) for each in demands}, reverse=True)
    needs = [f"{workers} x ({gpu:g} GPU, {cpu} CPU)" for workers, gpu, cpu in kinds]
    each = "; ".join(needs) if len(needs) < 4 else f"between {needs[0]} and {needs[-1]}"
    return f"{gpus} GPUs and {cpus} CPU cores on {len(nodes)} nodes; {missing} trials to run, each {each}"


def plan(
    space: str | Path,
    overrides: list[str] | None = None,
    profile: str | None = None,
    console: Console | None = None,
) -> list[TrialSpec]:
    """The trials of a search space, checked, without loading weights or starting Ray; notes go to `console`.

    Raises:
        RayPeftError: a wrong search space, or missing or malformed data or model.
    """
    loaded = load(space, overrides, profile)
    experiment.inspect_trials(loaded.trials, console or Console(quiet=True))
    if not loaded.trials:
        raise SearchSpaceError(f"{space}: has no trials")
    return loaded.trials
