"""A search space -> trials at once on the cluster -> rows."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ray_peft.checks.inspector import Inspector
from ray_peft.checks.trials import inspect_trials
from ray_peft.foundation import cache
from ray_peft.foundation.audience import Audience, Silence
from ray_peft.foundation.masking import mask
from ray_peft.schedule import cluster, experiment, repeats, tune
from ray_peft.schedule.control import added
from ray_peft.schedule.decide import Node, decide
from ray_peft.schedule.early import EarlyStopping
from ray_peft.schedule.joined import joined
from ray_peft.schedule.packs import proposed_at_a_time
from ray_peft.schedule.plan import cautions
from ray_peft.schedule.running import Plan, SweepRun
from ray_peft.schedule.search import Draws
from ray_peft.schedule.signals import callers_signals
from ray_peft.schedule.sizes import Scheduler
from ray_peft.space.read import Space, load
from ray_peft.store.adopted import adopt
from ray_peft.store.earlier import recall
from ray_peft.store.ledger import Ledger, SweepRecord
from ray_peft.store.progress import driving
from ray_peft.store.requests import open_channel
from ray_peft.trial.result import DONE, TrialResult


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
    unsent: tuple[str, ...] = ()
    """Trials, or the sweep's own name, of which the tracking store lacks something; `ray-peft sync` sends it."""

    @property
    def finished(self) -> bool:
        """True if every planned trial finished, or was stopped early by the search."""
        return not self.interrupted and all(row.status in DONE for row in self.results)

    @property
    def complete(self) -> bool:
        """True if every planned trial finished, and the tracking store has them all."""
        return self.finished and not self.unsent


@experiment.in_working_folder
def sweep(
    space: Space | str | Path,
    *,
    out: str | Path | None = None,
    address: str | None = None,
    connection: cluster.Connection | None = None,
    tracking_uri: str | None = None,
    overrides: list[str] | None = None,
    profile: str | None = None,
    fresh: bool = False,
    gpu_memory_gib: float | None = None,
    console: Audience | None = None,
) -> SweepOutcome:
    """Run every trial of a search space that has no finished row in `out` yet.

    Args:
        space: a search space or its file.
        out: folder for results, or a URL that is kept equal to one; None is `outputs/<name of the space>`.
        address: Ray cluster to join; None starts a local one.
        connection: to a cluster that several sweeps use; None makes one from `address`.
        tracking_uri: MLflow store; None as in `experiment.tracking_uri`.
        overrides: `key.path=value` settings that replace those of the file.
        profile: a profile of the search space, whose settings come before `overrides`.
        fresh: run finished trials again; their earlier rows are kept under another name.
        gpu_memory_gib: what a trial may take of a GPU, to see whether it fits a smaller one; None is all of it.
        console: where progress is written; None is silent.

    Raises:
        RayPeftError: a wrong search space, missing data or model, a store or cluster out of reach. Nothing was started.
    """
    console = console or Silence()
    if isinstance(space, Space):
        source = None
    else:
        source = Path(space)
        space = load(space, overrides, profile)
    ledger = Ledger(Path(out) if out else experiment.outputs_folder() / space.name)
    notes = [f"profile: {space.profile}"] if space.profile is not None else []
    notes += [f"limit: every trial was held to {gpu_memory_gib:g} GiB of a GPU"] if gpu_memory_gib is not None else []
    if space.search is None or space.search.algorithm != "optuna":  # whose draws are others
        notes += space.notes
        for note in space.notes:
            console.say(note)
    inspector = Inspector()
    late = [] if fresh else list(added(ledger.folder))
    checked = inspect_trials([*space.trials, *(trial for trial, _ in late)], console, inspector)
    notes += [*checked.notes, *(note for _, note in late)]
    space = replace(space, trials=checked.trials)
    uri = experiment.tracking_uri(tracking_uri, space.tracking)
    repeated = None if fresh else _repeated(space, ledger, inspector, notes, uri)
    if repeated is not None:
        console.say(f"{space.name}: {repeated.planned} trials, {repeated.planned} finished before")
        experiment.show(repeated.results, console)
        return repeated
    store = experiment.open_store(uri, space.tracking.experiment or space.name)
    with (
        ledger.locked(),
        callers_signals(),
        connection or cluster.Connection(address) as ray,
        ExitStack() as until_ended,
    ):
        plan = _plan(space, [] if fresh else _earlier_rows(ledger, console), inspector, ledger.folder, console)
        notes += plan.earlier.notes
        console.say(f"{space.name}: {plan.total} trials, {plan.total - plan.missing} finished before")
        nodes: list[Node] = []
        scheduler = Scheduler(nodes, gpu_memory_gib)
        if plan.missing:
            tune.quiet()
            nodes = joined(ray.connect(), plan.trials, ledger.folder, console)
            decide(plan.trials, nodes, {}).check()  # a trial that can never run here, before the others start
            scheduler = Scheduler(nodes, gpu_memory_gib)
            for caution in cautions(scheduler.decide(plan.todo)):
                console.say(caution)
        open_channel(ledger.folder)
        driver = until_ended.enter_context(driving(ledger.folder))
        if fresh:
            ledger.set_aside()
        opened = experiment.open_experiment(
            space.name,
            space.description,
            ledger,
            store=store,
            planned=[trial.trial_id for trial in (plan.earlier.trials if plan.draws is not None else plan.trials)],
            notes=notes,
            console=console,
            source=source.read_text(encoding="utf-8") if source else None,
            report=space.report,
        )
        opened.take_over(plan.earlier.finished, plan.earlier.renewed)
        interrupted = False
        try:
            if plan.missing:
                interrupted = SweepRun(plan, opened, scheduler, ray, driver).run(nodes)
        except BaseException:
            opened.finish(opened.record.planned, interrupted=True)
            raise
        results = opened.finish(opened.record.planned, interrupted)
    _trim_cache(console)
    return SweepOutcome(
        ledger.folder,
        results,
        max(plan.total, len(opened.record.planned)),
        interrupted,
        opened.record.tracking_uri,
        tuple(opened.lacking),
    )


def _trim_cache(console: Audience) -> None:
    """Keep the cache of prepared rows, encoded images and random weights within its limit."""
    if dropped := cache.trim():
        console.say(f"{len(dropped)} entries of {cache.cache_folder()} were not used for longest, and are removed")


def _earlier_rows(ledger: Ledger, console: Audience) -> list[TrialResult]:
    """The rows of the folder, those included that a driver was killed before it could list them."""
    if adopted := adopt(ledger):
        console.say(f"{len(adopted)} results that an interrupted sweep had not listed yet are added")
    return ledger.results()


def _plan(space: Space, rows: list[TrialResult], inspector: Inspector, folder: Path, console: Audience) -> Plan:
    early = EarlyStopping(space.search) if space.search is not None and space.search.scheduler is not None else None
    if space.search is not None and space.search.algorithm == "optuna":
        draws = Draws(space, inspector, console.say, folder)
        total = space.search.samples or 0
        samples = proposed_at_a_time(space.trials)
        return Plan(samples, samples, draws.remember(rows, total), draws, total, early)
    earlier = recall(space.trials, rows, inspector, stopped=early is not None)
    for note in earlier.notes:
        console.say(note)
    todo = [trial for trial in earlier.trials if trial.trial_id not in earlier.finished]
    return Plan(earlier.trials, todo, earlier, None, len(earlier.trials), early)


def _repeated(space: Space, ledger: Ledger, inspector: Inspector, notes: list[str], uri: str) -> SweepOutcome | None:
    """The outcome of a sweep whose every trial was finished, reported and tracked before; None if there is work."""
    if (space.search is not None and space.search.algorithm == "optuna") or not ledger.folder.is_dir():
        return None
    with ledger.locked():
        stopped = space.search is not None and space.search.scheduler is not None
        earlier = recall(space.trials, _earlier_rows(ledger, Silence()), inspector, stopped=stopped)
        written = ledger.read_record()
        if written is None or earlier.notes or earlier.renewed or len(earlier.finished) < len(earlier.trials):
            return None
        planned = [trial.trial_id for trial in earlier.trials]
        record = SweepRecord(
            space.name, space.description, notes, planned, written.parent_run_id, mask(uri), space.report.plain()
        )
        results = [earlier.finished[trial_id] for trial_id in planned]
        if not repeats.is_closed(ledger, record, results, uri, space.tracking.experiment or space.name):
            return None
    return SweepOutcome(ledger.folder, results, len(planned), interrupted=False, tracking_uri=mask(uri))
