"""Sends an outbox to its store: in order, each entry once, whichever process sends it and however often that fails."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.errors import TrackingError, first_line
from ray_peft.foundation.masking import mask
from ray_peft.foundation.measured import from_json
from ray_peft.foundation.storage import error_line
from ray_peft.store.outbox import Entry, Outbox, Sent
from ray_peft.store.tracking.inputs import DataSet, data_sets, scored_on
from ray_peft.store.tracking.rows import final_metrics, final_tags
from ray_peft.store.tracking.runs import close, create_run, log_data_sets, points, run_tags, running, upload
from ray_peft.store.tracking.store import Store, connect, insist
from ray_peft.trial.result import TrialResult

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

BATCH_POINTS = 500
BATCH_PARAMS = 100
BUSY_S = 5.0
"""How long another process may be sending from the same outbox."""


def send(store: Store, folder: Path, *, patience_s: float = 0.0, parent_run_id: str | None = None) -> Sent:
    """Send what waits in a trial's outbox. Entries that the store has taken are not sent again if a later one fails.

    Args:
        store: Where.
        folder: The trial's.
        patience_s: How long each call is repeated while the store is away.
        parent_run_id: The run above a run that is created now; None takes what its entry says.

    Raises:
        TrackingError: the store does not take it, another process is sending it, or the disk refuses.
    """
    outbox = Outbox(folder)
    try:
        with outbox.sending(BUSY_S):
            sent = outbox.sent(store_label(store))
            _Sending(store, outbox, sent, patience_s, parent_run_id).run()
            return sent
    except TimeoutError:
        raise TrackingError(f"another process is sending what waits in {folder}") from None
    except OSError as error:
        raise TrackingError(f"cannot send what waits in {folder}: {error_line(error, folder)}") from None


def store_label(store: Store) -> str:
    """A store's name in an outbox: without its credentials."""
    return f"{mask(store.uri)} {store.experiment_id}"


def sent_to(store: Store, folder: Path) -> Sent:
    """How much of a trial's outbox a store has taken."""
    return Outbox(folder).sent(store_label(store))


def is_sent(store: Store, folder: Path) -> bool:
    """True if the store has all that a trial had for it."""
    outbox = Outbox(folder)
    return not outbox.waits(outbox.sent(store_label(store)))


@dataclass
class _Sending:
    store: Store
    outbox: Outbox
    sent: Sent
    patience_s: float
    parent_run_id: str | None

    def run(self) -> None:
        waiting = list(self.outbox.after(self.sent.offset))
        if not waiting:
            return
        self.client: MlflowClient = connect(self.store.uri, self.until())
        # An attempt that another one has replaced keeps what it has sent; the rest of it is of no use.
        starts = [place for place, (entry, _) in enumerate(waiting) if entry["do"] == "start"]
        waiting = waiting[starts[-1] :] if starts else waiting
        while waiting:
            batch = [entry for entry, _ in waiting[: _batch(waiting)]]
            self.act(batch)
            self.sent.offset = waiting[len(batch) - 1][1]
            self.outbox.note(self.sent)
            del waiting[: len(batch)]

    def until(self) -> float:
        return time.monotonic() + self.patience_s

    def insist(self, what: str, call: Callable[[], Any]) -> Any:
        return insist(self.store, what, call, self.until())

    def act(self, batch: list[Entry]) -> None:
        entry = batch[0]
        kind = entry["do"]
        if kind == "start":
            self.start(entry)
        elif self.sent.run_id is None:  # of an outbox whose beginning is gone
            raise TrackingError(f"{self.outbox.folder}: its outbox has no start; run the trial again")
        elif kind == "metrics":
            self.metrics(batch)
        elif kind == "params":
            self.params(entry["values"])
        elif kind == "text":
            self.text(entry["content"], entry["file"])
        elif kind == "table":
            self.table(entry)
        elif kind == "artifact":
            self.artifact(entry)
        elif kind == "result":
            self.result(entry)
        elif kind == "close" and not self.sent.closed:
            run = self.insist("read a run", partial(self.client.get_run, self.run_id))
            close(self.client, self.store, run, entry["status"], entry["reason"], self.until())
            self.sent.closed = True

    @property
    def run_id(self) -> str:
        assert self.sent.run_id is not None
        return self.sent.run_id

    def start(self, entry: Entry) -> None:
        """Create the run; runs of the trial that are still open were left by a process that was killed."""
        tags = dict(entry["tags"])
        parent = self.parent_run_id if "mlflow.parentRunId" in tags else None
        tags |= {"mlflow.parentRunId": parent} if parent is not None else {}
        trial_id, parent, sweep = tags["ray_peft.trial_id"], tags.get("mlflow.parentRunId"), tags["ray_peft.sweep"]
        again = self.sent.creating == entry["token"]
        for stale in running(self.client, self.store, parent, trial_id, sweep, self.until()):
            if not (again and stale.data.tags.get("ray_peft.start") == entry["token"]):
                why = "interrupted; a later run of this trial replaces it"
                close(self.client, self.store, stale, "KILLED", why, self.until())
        self.sent.creating = entry["token"]
        self.outbox.note(self.sent)
        self.sent.run_id = create_run(
            self.client, self.store, trial_id, tags, token=entry["token"], again=again, until=self.until()
        )
        self.sent.closed, self.sent.tables, self.sent.creating = False, [], None

    def params(self, values: dict[str, str]) -> None:
        from mlflow.entities import Param

        logged = [Param(key, value) for key, value in values.items()]
        for first in range(0, len(logged), BATCH_PARAMS):
            part = logged[first : first + BATCH_PARAMS]
            self.insist("store parameters", partial(self.client.log_batch, self.run_id, params=part))

    def metrics(self, batch: list[Entry]) -> None:
        logged = [point for entry in batch for point in points(_numbers(entry["values"]), entry["step"], entry["at"])]
        for first in range(0, len(logged), BATCH_POINTS):
            part = logged[first : first + BATCH_POINTS]
            self.insist("store metrics", partial(self.client.log_batch, self.run_id, metrics=part))

    def text(self, content: str, artifact_file: str) -> None:
        self.insist(f"store {artifact_file}", partial(self.client.log_text, self.run_id, content, artifact_file))

    def table(self, entry: Entry) -> None:
        """Store rows so that MLflow's table view shows them.

        `MlflowClient.log_table` adds rows to an existing file, so repeating it would double them.
        """
        path = entry["file"]
        self.text(json.dumps({"columns": entry["columns"], "data": entry["data"]}), path)
        self.sent.tables = [table for table in self.sent.tables if table["path"] != path]
        self.sent.tables.append({"path": path, "type": "table"})
        listed = json.dumps(self.sent.tables)
        self.insist(f"list {path}", partial(self.client.set_tag, self.run_id, "mlflow.loggedArtifacts", listed))

    def artifact(self, entry: Entry) -> None:
        path = self.outbox.folder / entry["path"]
        if not path.exists():
            if not entry["remove"]:  # else it was sent, and its process was killed before it could say so
                logger.warning("%s is gone before the tracking store got it", path)
            return
        upload(self.client, self.store, self.run_id, path, entry["to"], self.until())
        if entry["remove"]:
            shutil.rmtree(path)

    def result(self, entry: Entry) -> None:
        """Store the row, and close the run."""
        row = TrialResult.model_validate_json(entry["row"]).model_copy(update={"mlflow_run_id": self.run_id})
        what = f"store the result of trial {row.trial_id}"
        final, tags = points(final_metrics(row), row.steps, entry["at"]), run_tags(final_tags(row))
        sets = data_sets(row)
        linked = _linked(final, scored_on(row, sets))
        log_data_sets(self.client, self.store, self.run_id, sets, self.until())
        self.insist(what, partial(self.client.log_batch, self.run_id, metrics=linked, tags=tags))
        files = {
            "result.json": json.dumps(row.plain(), indent=2),
            "versions.json": json.dumps(row.provenance.versions, indent=2, sort_keys=True),
        }
        if row.status != "finished":
            files["error.txt"] = row.error or row.status
        for artifact_file, content in files.items():
            self.insist(what, partial(self.client.log_text, self.run_id, mask(content), artifact_file))
        status = {"finished": "FINISHED", "stopped_early": "KILLED", "cancelled": "KILLED"}.get(row.status, "FAILED")
        self.insist(what, partial(self.client.set_terminated, self.run_id, status, entry["at"]))
        self.sent.closed = True


def _linked(final: Sequence[Metric], data: DataSet | None) -> list[Metric]:
    """The metrics, of which scores say their data set, where there is one."""
    from mlflow.entities import Metric

    if data is None:
        return list(final)
    of = {"dataset_name": data.name, "dataset_digest": data.digest}
    return [
        Metric(metric.key, metric.value, metric.timestamp, metric.step, **of)
        if metric.key.startswith("scores.") and not metric.key.startswith("scores.benchmark")
        else metric
        for metric in final
    ]


def _batch(waiting: list[tuple[Entry, int]]) -> int:
    """How many of the first entries go in one call: live metrics together, everything else alone."""
    count = values = 0
    while count < len(waiting) and waiting[count][0]["do"] == "metrics" and values < BATCH_POINTS:
        values += len(waiting[count][0]["values"])
        count += 1
    return max(1, count)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(from_json(value)) for name, value in values.items()}


def why_unsent(error: Exception | str | None) -> str:
    """One line for a row that its store lacks."""
    return first_line(error) or "it is still being sent"
