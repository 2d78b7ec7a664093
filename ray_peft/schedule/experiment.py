"""What single runs and sweeps share: the store, the output folder, the report."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar, cast

from ray_peft.errors import ReportLost, StorageError, TrackingError, first_line
from ray_peft.foundation.audience import Audience, Silence
from ray_peft.foundation.masking import mask, mask_address
from ray_peft.foundation.storage import error_line
from ray_peft.foundation.whole import write_text
from ray_peft.report.files import REPORT, write_report
from ray_peft.report.plain import console_table
from ray_peft.schedule import repeats
from ray_peft.space.read import ReportSpec, TrackingSpec
from ray_peft.spec import TrialSpec
from ray_peft.store import tracking
from ray_peft.store.adopted import left_row, make_way, note_restart, restarts
from ray_peft.store.keeping import LastSteps, Rows
from ray_peft.store.ledger import Ledger, SweepRecord
from ray_peft.store.outbox import Outbox
from ray_peft.store.places import working_folder
from ray_peft.store.remote import is_url
from ray_peft.store.tracking import Store
from ray_peft.store.unsent import Unsent
from ray_peft.trial.live import STOP_FILE
from ray_peft.trial.result import DONE, RESTARTS_FILE, Status, TrialResult

Settings = ParamSpec("Settings")
OutcomeT = TypeVar("OutcomeT")

SHORT_PATIENCE_S = 3.0
"""How long a store that is away is waited for while trials run."""
END_PATIENCE_S = 15.0
"""And at the end of a sweep."""


def outputs_folder() -> Path:
    """Where results are stored by default: RAY_PEFT_OUTPUTS, or `outputs` in the current folder.

    Raises:
        StorageError: RAY_PEFT_OUTPUTS is a URL.
    """
    folder = os.environ.get("RAY_PEFT_OUTPUTS", "outputs")
    if is_url(folder):
        raise StorageError(f"RAY_PEFT_OUTPUTS={mask_address(folder)}: must be a folder; --out may be a URL")
    return Path(folder).absolute()


def in_working_folder(run: Callable[Settings, OutcomeT]) -> Callable[Settings, OutcomeT]:
    """Let a function whose argument `out` is a folder take a URL, too, which is then kept equal to a folder.

    The function's argument `console` is told of that.
    """

    @functools.wraps(run)
    def run_there(*args: Settings.args, **settings: Settings.kwargs) -> OutcomeT:
        out, console = cast("str | Path | None", settings.get("out")), cast("Audience | None", settings.get("console"))
        if not out:
            return run(*args, **settings)
        with working_folder(out, outputs_folder(), console or Silence()) as folder:
            settings["out"] = folder
            return run(*args, **settings)

    return run_there


def tracking_uri(chosen: str | None, tracking_spec: TrackingSpec | None = None) -> str:
    """The store in use: the caller's choice, the search space's, MLFLOW_TRACKING_URI, else SQLite in the outputs."""
    of_space = tracking_spec.uri if tracking_spec is not None else None
    return chosen or of_space or os.environ.get("MLFLOW_TRACKING_URI") or tracking.default_uri(outputs_folder())


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
    """Takes the trials' rows; `keep` puts them there."""
    unsent: Unsent
    """What the store lacks."""
    lacking: dict[str, str] = field(default_factory=dict)
    """After `finish`: what the store still lacks, by trial or by the sweep's name, with the reason."""

    @property
    def parent_run_id(self) -> str:
        """The MLflow run that holds the trials' runs."""
        assert self.record.parent_run_id is not None
        return self.record.parent_run_id

    def begin(self, spec: TrialSpec, *, again: bool = False) -> None:
        """A trial is about to start, or to start `again` in this sweep.

        What an earlier attempt left is not its row, unless that one finished.
        """
        folder = self.ledger.trial_folder(spec.trial_id)
        make_way(folder, spec.trial_id, again=again)
        if not again:
            for name in (RESTARTS_FILE, STOP_FILE):
                (folder / name).unlink(missing_ok=True)

    def stop_early(self, spec: TrialSpec, reason: str) -> None:
        """End a running trial before its last step."""
        write_text(self.ledger.trial_folder(spec.trial_id) / STOP_FILE, reason)

    def may_start_again(self, spec: TrialSpec) -> bool:
        """True if a trial whose worker died left no row that stands, and has not died too often yet."""
        folder = self.ledger.trial_folder(spec.trial_id)
        row = left_row(folder, spec.trial_id)
        ended = row is not None and row.status != "cancelled"
        return not ended and len(restarts(folder)) < spec.resources.max_failures

    def again(self, spec: TrialSpec, reason: str) -> None:
        """A trial's worker died, and it is started once more."""
        with contextlib.suppress(OSError):  # a full disk, which the trial itself will tell
            note_restart(self.ledger.trial_folder(spec.trial_id), first_line(reason))
        self.console.say(f"{spec.trial_id}: {first_line(reason)}; it is started again")

    def keep(self, row: TrialResult) -> None:
        """Take a trial's row; what the store lacks of it is sent later."""
        self.rows.add(row)
        if row.untracked is not None:
            self.unsent.add(row.trial_id, row.untracked)

    def lost(self, spec: TrialSpec, status: Literal["failed", "cancelled"], reason: str) -> TrialResult:
        """The row of a trial whose worker died: what it left in its folder, else a row with the reason."""
        folder = self.ledger.trial_folder(spec.trial_id)
        row = left_row(folder, spec.trial_id)
        if row is not None and row.status == "cancelled":
            row = row.model_copy(update={"error": reason})  # its worker did not know why
        if row is None:
            kind: Status = "out_of_memory" if "OutOfMemoryError" in reason else status
            row = TrialResult(trial_id=spec.trial_id, status=kind, spec=spec, error=reason, restarts=restarts(folder))
            outbox = Outbox(folder)
            if not outbox.exists:  # it died before it had anything to say
                return row
            if not outbox.ended:
                outbox.put({"do": "close", "status": "FAILED" if status == "failed" else "KILLED", "reason": reason})
        return self.delivered(row)

    def delivered(self, row: TrialResult) -> TrialResult:
        """A row with its MLflow run, once the store has all of the trial, or says why it lacks it."""
        folder = self.ledger.trial_folder(row.trial_id)
        outbox = Outbox(folder)
        if not outbox.exists:  # of a version without one: live metrics and trained weights went with its worker
            tracker = tracking.TrialTracker(self.store, self.parent_run_id, self.name, folder)
            tracker.start(row.spec)
            return tracker.record(row)
        if not outbox.ended:
            outbox.put({"do": "result", "row": row.model_dump_json(), "at": int(time.time() * 1000)})
        try:
            sent = tracking.send(
                self.store, folder, patience_s=SHORT_PATIENCE_S, parent_run_id=self.record.parent_run_id
            )
        except TrackingError as error:
            run_id = tracking.sent_to(self.store, folder).run_id
            return row.model_copy(update={"untracked": str(error), "mlflow_run_id": run_id})
        return row.model_copy(update={"untracked": None, "mlflow_run_id": sent.run_id})

    def take_over(self, finished: dict[str, TrialResult], renewed: Iterable[TrialResult]) -> None:
        """Send to the store what it lacks of trials that finished before, and close runs that no process writes to.

        Args:
            finished: rows by trial id, which are replaced by what the ledger has then.
            renewed: those that are written otherwise today than in the ledger.
        """
        for row in renewed:
            self.rows.add(row)
        away = False
        for trial_id, row in list(finished.items()):
            if row.untracked is None and tracking.is_sent(self.store, self.ledger.trial_folder(trial_id)):
                continue
            if not away:
                finished[trial_id] = self.delivered(row)
                away = finished[trial_id].untracked is not None
            self.keep(finished[trial_id] if not away else row.model_copy(update={"untracked": row.untracked or "away"}))
            if finished[trial_id].untracked is None:
                self.console.say(f"{trial_id}: its result, which the tracking store lacked, is there now")
        open_runs = {str(row.mlflow_run_id) for row in finished.values() if row.untracked is not None}
        closed = tracking.close_open(self.store, self.parent_run_id, "interrupted: its process was killed", open_runs)
        if closed:
            self.console.say(f"{closed} runs that an interrupted sweep had left open in MLflow are closed (KILLED)")

    def _say_lacking(self) -> None:
        """Name what the store lacks, and what brings it there."""
        names, reasons = ", ".join(self.lacking), dict.fromkeys(self.lacking.values())
        self.console.say(
            f"caution: the tracking store lacks {names}: {'; '.join(reasons)}. Every row is in "
            f"{self.ledger.folder / 'results.jsonl'}; when the store is back: ray-peft sync {self.ledger.folder}"
        )

    def _close_run(
        self, status: Literal["FINISHED", "FAILED", "KILLED"], counts: dict[str, float], results: list[TrialResult]
    ) -> None:
        """Store the report and the counts in the sweep's run and close it, unless the store is away."""
        names = (REPORT, "report.html", "report.csv", "results.jsonl", "plots")
        files = {name: self.ledger.folder / name for name in names if (self.ledger.folder / name).exists()}
        if self.unsent.away:
            self.lacking[self.name] = next(iter(self.lacking.values()))
            return
        patience_s = 0.0 if self.lacking else END_PATIENCE_S
        try:
            tracking.finish_sweep(
                self.store, self.parent_run_id, status, metrics=counts, files=files, results=results,
                patience_s=patience_s,
            )  # fmt: skip
        except TrackingError as error:
            self.lacking[self.name] = str(error)

    def finish(self, planned: list[str], interrupted: bool) -> list[TrialResult]:
        """Write the report, close the runs and print the comparison; returns the planned trials' rows.

        What the tracking store does not take stands in `lacking` afterwards.

        Raises:
            RayPeftError: another step failed; all the others were done.
        """
        last = LastSteps()
        self.lacking = self.unsent.close(END_PATIENCE_S)
        for row in self.ledger.results():
            folder = self.ledger.trial_folder(row.trial_id)
            if row.untracked is not None and Outbox(folder).exists and tracking.is_sent(self.store, folder):
                run_id = tracking.sent_to(self.store, folder).run_id
                self.rows.add(row.model_copy(update={"untracked": None, "mlflow_run_id": run_id}))
        with last.step():
            self.rows.flush()
        _clear_ray(self.ledger)
        with last.step():
            write_report(self.ledger.folder)
        rows = {result.trial_id: result for result in (*self.ledger.results(), *self.rows.waiting)}
        results = [rows[trial] for trial in planned if trial in rows] if planned else list(rows.values())
        bad = [result for result in results if result.status not in DONE]
        status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED"
        if interrupted:
            status = "KILLED"
        elif bad:
            status = "FAILED"
        counts = {"trials": float(len(results)), "trials_not_finished": float(len(bad))}
        self._close_run(status, counts, results)
        show(results, self.console)
        if self.lacking:
            self._say_lacking()
        try:
            last.done()
        except StorageError as error:
            raise ReportLost(str(error)) from error
        except OSError as error:
            raise ReportLost(error_line(error, self.ledger.folder)) from error
        if status == "FINISHED" and not self.lacking:
            repeats.close(self.ledger, self.record, results)
        return results


def _clear_ray(ledger: Ledger) -> None:
    """Remove what Ray Tune and Ray Train keep for themselves: nothing of it is read again."""
    shutil.rmtree(ledger.folder / "ray", ignore_errors=True)


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
    """Open the sweep's parent run, or that of the interrupted sweep in this folder; one that is gone is made anew.

    Raises:
        TrackingError: the store cannot be reached.
        StorageError: the folder cannot be written.
    """
    _clear_ray(ledger)
    earlier = ledger.read_record()
    masked = mask(store.uri)
    parent = earlier.parent_run_id if earlier is not None and earlier.tracking_uri == masked else None
    gone = parent is not None and not tracking.is_there(store, parent)
    if gone or (earlier is not None and earlier.name != name):
        if parent is not None and not gone:  # of another sweep in this folder: nobody will close it any more
            tracking.close_if_open(store, parent, "another sweep has taken its folder")
        parent = None
    if parent is None:
        files = {"search_space.yaml": source} if source is not None else {}
        tags = {"ray_peft.out": str(ledger.folder), "mlflow.note.content": description}
        parent = tracking.start_sweep(store, name, tags={k: v for k, v in tags.items() if v}, files=files)
        if gone:
            console.say("this sweep's run is gone from MLflow: a new one takes its trials")
            trials = [row.mlflow_run_id for row in ledger.results() if row.mlflow_run_id is not None]
            tracking.move_below(store, trials, parent)
    record = SweepRecord(name, description, notes, planned, parent, masked, (report or ReportSpec()).plain())
    try:
        ledger.write_record(record)
    except StorageError:
        tracking.finish_sweep(store, parent, "FAILED", metrics={}, files={})
        raise
    unsent = Unsent(store, ledger.trial_folder, parent, console)
    return Experiment(name, ledger, store, record, console, Rows(ledger, console), unsent)
