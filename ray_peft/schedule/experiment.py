"""What single runs and sweeps share: the store, the output folder, the report."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ray_peft.errors import StorageError, TrackingError
from ray_peft.foundation.audience import Audience
from ray_peft.foundation.masking import mask
from ray_peft.report.files import REPORT, write_report
from ray_peft.report.plain import console_table
from ray_peft.schedule import repeats
from ray_peft.space.read import ReportSpec, TrackingSpec
from ray_peft.spec import TrialSpec
from ray_peft.store import tracking
from ray_peft.store.keeping import LastSteps, Rows
from ray_peft.store.ledger import Ledger, SweepRecord
from ray_peft.store.tracking import RunStatus, Store
from ray_peft.trial.result import Status, TrialResult


def outputs_folder() -> Path:
    """Where results are kept unless told otherwise: RAY_PEFT_OUTPUTS, or `outputs` here."""
    return Path(os.environ.get("RAY_PEFT_OUTPUTS", "outputs")).absolute()


def tracking_uri(chosen: str | None, tracking_spec: TrackingSpec) -> str:
    """The store in use: the caller's choice, the search space's, MLFLOW_TRACKING_URI, else SQLite in the outputs."""
    return (
        chosen or tracking_spec.uri or os.environ.get("MLFLOW_TRACKING_URI") or tracking.default_uri(outputs_folder())
    )


def open_store(uri: str, experiment: str) -> Store:
    """The store's experiment, created if need be; artifacts of a SQLite store are kept in the outputs.

    Raises:
        TrackingError: the store cannot be reached.
    """
    artifacts = outputs_folder() / "mlartifacts" if uri.startswith("sqlite:") else None
    return tracking.open_store(uri, experiment, artifacts)


@dataclass
class Experiment:
    """An opened output folder with its tracking store."""

    name: str
    ledger: Ledger
    store: Store
    record: SweepRecord
    console: Audience
    rows: Rows
    """Takes the trials' rows."""

    @property
    def parent_run_id(self) -> str:
        """The MLflow run that holds the trials' runs."""
        assert self.record.parent_run_id is not None
        return self.record.parent_run_id

    def lost(self, spec: TrialSpec, status: Literal["failed", "cancelled"], reason: str) -> TrialResult:
        """The row of a trial whose worker died without leaving one; its MLflow run is closed, if the store answers."""
        run_status: Literal["FAILED", "KILLED"] = "FAILED" if status == "failed" else "KILLED"
        kind: Status = "out_of_memory" if "OutOfMemoryError" in reason else status
        run_id, untracked = None, None
        try:
            run_id = tracking.close_orphan(self.store, self.parent_run_id, spec.trial_id, run_status, reason)
        except TrackingError as error:  # the row does not depend on it, nor do the other trials
            untracked = str(error)
        return TrialResult(
            trial_id=spec.trial_id, status=kind, spec=spec, error=reason, mlflow_run_id=run_id, untracked=untracked
        )

    def track(self, row: TrialResult) -> TrialResult:
        """A finished row that the store lacks, under a new run with its settings and result; as it was if that fails.

        Live metrics and the trained weights went with the worker that made them.
        """
        tracker = tracking.TrialTracker(self.store, self.parent_run_id, self.name)
        try:
            run_id = tracker.start(row.spec)
            told = row.model_copy(update={"untracked": None, "mlflow_run_id": run_id})
            tracker.record(told)
        except TrackingError as error:
            return row.model_copy(update={"untracked": str(error)})
        self.console.say(f"{row.trial_id}: its result, which the tracking store lacked, is there now")
        return told

    def _close_untracked(self, results: list[TrialResult], last: LastSteps) -> None:
        """Say which results MLflow lacks, and close their runs, if the store is back."""
        lacking = [result for result in results if result.untracked is not None]
        if lacking:
            names = ", ".join(result.trial_id for result in lacking)
            self.console.say(f"caution: the tracking store lacks the results of {names}; results.jsonl has them")
        for result in lacking:
            run: RunStatus = "FINISHED" if result.status == "finished" else "FAILED"
            with last.step():
                tracking.close_orphan(self.store, self.parent_run_id, result.trial_id, run, result.untracked or "")

    def finish(self, planned: list[str], interrupted: bool) -> list[TrialResult]:
        """Write the report, close the runs and print the comparison; returns the planned trials' rows.

        Raises:
            RayPeftError: something of it failed, after all the rest was done.
        """
        last = LastSteps()
        with last.step():
            self.rows.flush()
        with last.step():
            write_report(self.ledger.folder)
        rows = {result.trial_id: result for result in (*self.ledger.results(), *self.rows.waiting)}
        results = [rows[trial] for trial in planned if trial in rows] if planned else list(rows.values())
        bad = [result for result in results if result.status != "finished"]
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED"
        if interrupted:
            status = "KILLED"
        elif bad:
            status = "FAILED"
        counts = {"trials": float(len(results)), "trials_not_finished": float(len(bad))}
        names = (REPORT, "report.html", "report.csv", "results.jsonl", "plots")
        files = {name: self.ledger.folder / name for name in names if (self.ledger.folder / name).exists()}
        self._close_untracked(results, last)
        with last.step():
            tracking.finish_sweep(self.store, self.parent_run_id, status, metrics=counts, files=files)
        show(results, self.console)
        last.done()
        if status == "FINISHED":
            repeats.close(self.ledger, self.record, results)
        return results


def show(results: list[TrialResult], console: Audience) -> None:
    """Print the comparison."""
    console.say("")
    console.say(console_table(results))


def open_experiment(
    name: str,
    description: str,
    ledger: Ledger,
    *,
    store: Store,
    planned: list[str],
    notes: list[str],
    console: Audience,
    source: str | None = None,
    report: ReportSpec | None = None,
) -> Experiment:
    """Open the sweep's parent run, or that of the interrupted sweep in this folder.

    Raises:
        TrackingError: the store cannot be reached.
        StorageError: the folder cannot be written.
    """
    earlier = ledger.read_record()
    masked = mask(store.uri)
    same = earlier is not None and (earlier.name, earlier.tracking_uri) == (name, masked)
    parent = earlier.parent_run_id if earlier is not None and same else None
    if parent is None:
        files = {"search_space.yaml": source} if source is not None else {}
        tags = {"ray_peft.out": str(ledger.folder), "mlflow.note.content": description}
        parent = tracking.start_sweep(store, name, tags={k: v for k, v in tags.items() if v}, files=files)
    record = SweepRecord(name, description, notes, planned, parent, masked, (report or ReportSpec()).plain())
    try:
        ledger.write_record(record)
    except StorageError:
        tracking.finish_sweep(store, parent, "FAILED", metrics={}, files={})
        raise
    return Experiment(name, ledger, store, record, console, Rows(ledger, console))
