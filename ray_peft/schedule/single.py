"""One experiment, as a Ray Train TorchTrainer of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ray_peft.checks.trials import inspect_trials
from ray_peft.errors import ClusterLost, SearchSpaceError, SpecError, TrialFailed
from ray_peft.foundation.audience import Audience, Silence
from ray_peft.schedule import cluster, experiment, watch, worker
from ray_peft.schedule.decide import Demand
from ray_peft.schedule.joined import joined
from ray_peft.schedule.plan import cautions
from ray_peft.schedule.signals import callers_signals
from ray_peft.schedule.sizes import Scheduler
from ray_peft.schedule.stop import Stop
from ray_peft.space.explained import explain
from ray_peft.space.read import ReportSpec, TrackingSpec, load
from ray_peft.spec import TrialSpec
from ray_peft.store.ledger import Ledger
from ray_peft.trial.result import RESTARTS_FILE, RESULT_FILE, TrialResult


@experiment.in_working_folder
def run(
    spec: TrialSpec | Mapping[str, Any] | str | Path,
    *,
    out: str | Path | None = None,
    address: str | None = None,
    tracking_uri: str | None = None,
    overrides: list[str] | None = None,
    profile: str | None = None,
    gpu_memory_gib: float | None = None,
    console: Audience | None = None,
) -> TrialResult:
    """Run one trial and return its row; a failed trial is a row too.

    Args:
        spec: a trial, its plain form, or a YAML file that holds exactly one.
        out: folder for the trial's files, or a URL that is kept equal to one; None is `outputs/<trial id>`.
        address: Ray cluster to join; None starts a local one.
        tracking_uri: MLflow store; None as in `experiment.tracking_uri`.
        overrides: `key.path=value` settings that replace those of a YAML file.
        profile: a profile of the YAML file.
        gpu_memory_gib: what the trial may take of a GPU, to see whether it fits a smaller one; None is all of it.
        console: where progress is written; None is silent.

    Raises:
        RayPeftError: a wrong spec, missing data or model, a store or cluster out of reach.
    """
    console = console or Silence()
    trial, tracking_spec, report = _trial(spec, overrides, profile)
    if trial.members():
        raise SpecError("method ensemble: a run makes one trial, but an ensemble needs its members; use a sweep")
    checked = inspect_trials([trial], console)
    (trial,), notes = checked.trials, checked.notes
    ledger = Ledger(Path(out) if out else experiment.outputs_folder() / trial.trial_id)
    store = experiment.open_store(
        experiment.tracking_uri(tracking_uri, tracking_spec), tracking_spec.experiment or "single runs"
    )
    with ledger.locked(), callers_signals(), cluster.Connection(address) as ray:
        nodes = joined(ray.connect(), [trial], ledger.folder, console)
        scheduler = Scheduler(nodes, gpu_memory_gib)
        decision = scheduler.decide([trial], alone=[trial.trial_id])
        for caution in cautions(decision):
            console.say(caution)
        opened = experiment.open_experiment(
            trial.trial_id,
            "",
            ledger,
            store=store,
            planned=[trial.trial_id],
            notes=notes,
            console=console,
            report=report,
        )
        interrupted = True
        try:
            opened.keep(_run(trial, opened, decision.runs[0].demand, ray))
            interrupted = False
        except KeyboardInterrupt:
            ray.close()  # no worker may still write to the run that is closed here
            opened.keep(opened.lost(trial, "cancelled", "interrupted by the user"))
            raise
        except ClusterLost as error:
            ray.close()
            opened.keep(opened.lost(trial, "cancelled", str(error)))
            raise
        finally:
            results = opened.finish([trial.trial_id], interrupted)
    return results[0]


def _run(trial: TrialSpec, opened: experiment.Experiment, demand: Demand, ray: cluster.Connection) -> TrialResult:
    """Run the trial, again if its workers die or its local Ray does."""
    for name in (RESULT_FILE, RESTARTS_FILE):  # of an earlier run of it
        (opened.ledger.trial_folder(trial.trial_id) / name).unlink(missing_ok=True)
    storage = opened.ledger.folder / "ray"
    storage.mkdir(parents=True, exist_ok=True)
    stop = Stop(storage / f"stop-{os.urandom(4).hex()}")
    assignment = worker.Assignment(
        spec=trial,
        folder=opened.ledger.trial_folder(trial.trial_id),
        store=opened.store,
        parent_run_id=opened.parent_run_id,
        sweep=opened.name,
        demand=demand,
        stop_file=stop.file,
        sign=opened.ledger.record_file,
    )
    rows: list[TrialResult] = []
    failures = 0
    while not rows:
        try:
            if not watch.waited(lambda: rows.append(worker.run_in_trainer(assignment, storage)), stop.ask):
                raise KeyboardInterrupt
        except TrialFailed as error:
            failures += 1
            if failures > trial.resources.max_failures:
                return opened.lost(trial, "failed", str(error))
            opened.again(trial, str(error))
        except ClusterLost as error:
            failures += 1
            if not ray.replaceable or not opened.may_start_again(trial):
                raise
            opened.again(trial, error.reason)
            ray.replace()
    return rows[0]


def _trial(
    spec: TrialSpec | Mapping[str, Any] | str | Path, overrides: list[str] | None, profile: str | None
) -> tuple[TrialSpec, TrackingSpec, ReportSpec]:
    if isinstance(spec, TrialSpec):
        return spec.located(), TrackingSpec(), ReportSpec()
    if isinstance(spec, Mapping):
        try:
            return TrialSpec.from_plain(dict(spec)).located(), TrackingSpec(), ReportSpec()
        except ValidationError as error:
            raise SpecError("\n".join(explain(error))) from None
    space = load(spec, overrides, profile)
    if len(space.trials) != 1:
        raise SearchSpaceError(
            f"{spec}: holds {len(space.trials)} trials, but a run takes one; use `ray-peft sweep` for a grid"
        )
    return space.trials[0], space.tracking, space.report
