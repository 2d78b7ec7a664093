"""One trial's run: parameters at its start, live metrics that wait out an outage, and the result."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ray_peft.errors import first_line
from ray_peft.foundation import dotted
from ray_peft.foundation.masking import mask
from ray_peft.spec import TrialSpec
from ray_peft.store.tracking.runs import close, create_run, fetch, points, run_tags, running, upload
from ray_peft.store.tracking.store import PATIENCE_S, Store, connect, failures, insist, reason
from ray_peft.trial.result import TrialResult

if TYPE_CHECKING:
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

FLUSH_EVERY_S = 2.0
FLUSH_AT_POINTS = 200
BATCH_POINTS = 500
BATCH_PARAMS = 100
MAX_PARAM_CHARACTERS = 6000
_REFUSED = re.compile(r"[^\w./ :-]")
"""Characters that MLflow refuses in the name of a metric, such as that of pass@1."""
TOKENIZERS = ("bleu_tokenizer", "rouge_tokenizer")
"""Fields of `Scores` that say how text was cut."""
_MAIN_VERSIONS = ("python", "torch", "transformers", "trl", "peft", "bitsandbytes", "ray", "mlflow")


class TrialTracker:
    """One trial's run. Live metrics wait out an outage of the store; what can be lost is an error."""

    def __init__(self, store: Store, parent_run_id: str | None, sweep: str) -> None:
        self._store, self._parent, self._sweep = store, parent_run_id, sweep
        self._run_id: str | None = None
        self._tables: list[dict[str, str]] = []
        self._buffer: list[Metric] = []
        self._buffer_lock = threading.Lock()
        self._sending = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        # A thread of its own, so that a slow store does not slow down the training that is being measured.
        self._flusher = threading.Thread(target=self._flush_often, name="mlflow-metrics", daemon=True)

    @property
    def run_id(self) -> str:
        """The id of the trial's run, once it has started."""
        assert self._run_id is not None, "TrialTracker.start() comes first"
        return self._run_id

    def start(self, spec: TrialSpec) -> str:
        """Create the trial's run with its parameters and spec.json, and return its id.

        A run of the same trial that a killed process left open is closed as KILLED.

        Raises:
            TrackingError: the store does not take it.
        """
        store, trial_id = self._store, spec.trial_id
        self._client = client = connect(store.uri)
        for stale in running(client, store, self._parent, trial_id, self._sweep):
            close(client, store, stale, "KILLED", "interrupted; a later run of this trial replaces it")
        tags = {"ray_peft.trial_id": trial_id, "ray_peft.method": spec.method.name, "ray_peft.sweep": self._sweep}
        if self._parent is not None:
            tags["mlflow.parentRunId"] = self._parent
        self._run_id = create_run(client, store, trial_id, tags)
        self._log_params({key: mask(value) for key, value in flatten(spec.plain()).items()})
        self.text(mask(json.dumps(spec.plain(), indent=2)), "spec.json")
        self._flusher.start()
        return self._run_id

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take live metrics; they reach the store within seconds, or when it is back. Never raises.

        A NaN is stored as such; MLflow's SQL stores turn an infinity into the largest float of its sign.
        """
        taken = points(metrics, step)
        with self._buffer_lock:
            self._buffer += taken
            if len(self._buffer) >= FLUSH_AT_POINTS:
                self._wake.set()

    def artifact(self, path: Path, folder: str) -> None:
        """Store a file, or a folder's whole content, under the artifact folder `folder` ("" is the top).

        Raises:
            TrackingError: nothing is at `path`, or the store does not take it.
        """
        upload(self._client, self._store, self.run_id, path, folder if path.is_dir() else f"{folder}/{path.name}")

    def text(self, content: str, artifact_file: str) -> None:
        """Store `content` as the artifact `artifact_file`.

        Raises:
            TrackingError: the store does not take it.
        """
        call = partial(self._client.log_text, self.run_id, content, artifact_file)
        insist(self._store, f"store {artifact_file}", call)

    def table(self, rows: list[dict[str, object]], artifact_file: str) -> None:
        """Store rows so that MLflow's table view shows them and `load_table` reads them.

        `MlflowClient.log_table` adds rows to an existing file, so repeating it would double them.

        Args:
            rows: Equal keys make a column; a missing key is empty.
            artifact_file: A path that ends in .json.

        Raises:
            TrackingError: the store does not take it.
        """
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[_cell(row.get(column)) for column in columns] for row in rows]
        self.text(json.dumps({"columns": columns, "data": data}, default=str), artifact_file)
        self._tables = [entry for entry in self._tables if entry["path"] != artifact_file]
        self._tables.append({"path": artifact_file, "type": "table"})
        tag = partial(self._client.set_tag, self.run_id, "mlflow.loggedArtifacts", json.dumps(self._tables))
        insist(self._store, f"list the table {artifact_file}", tag)

    def fetch(self, run_id: str, folder: str, to: Path) -> Path:
        """Bring the artifact folder of another run below `to` and return its path there.

        Raises:
            TrackingError: the run has no such folder, or the store does not answer.
        """
        return fetch(self._store.uri, run_id, folder, to)

    def record(self, result: TrialResult) -> None:
        """Store everything that waits, then the result, and close the run.

        Raises:
            TrackingError: the result or a live metric could not be stored within `PATIENCE_S`.
        """
        store, client, run_id = self._store, self._client, self.run_id
        until = time.monotonic() + PATIENCE_S
        self._closing.set()
        self._wake.set()
        self._flusher.join(timeout=PATIENCE_S)
        what = f"store the result of trial {result.trial_id}"
        insist(store, f"store the metrics of trial {result.trial_id}", self._flush, until)
        final, tags = points(final_metrics(result), result.steps), run_tags(final_tags(result))
        insist(store, what, partial(client.log_batch, run_id, metrics=final, tags=tags), until)
        files = {
            "result.json": json.dumps(result.model_copy(update={"mlflow_run_id": run_id}).plain(), indent=2),
            "versions.json": json.dumps(result.provenance.versions, indent=2, sort_keys=True),
        }
        if result.status != "finished":
            files["error.txt"] = result.error or result.status
        for artifact_file, content in files.items():
            insist(store, what, partial(client.log_text, run_id, mask(content), artifact_file), until)
        status = {"finished": "FINISHED", "cancelled": "KILLED"}.get(result.status, "FAILED")
        insist(store, what, partial(client.set_terminated, run_id, status), until)

    def _log_params(self, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        logged = []
        for key, value in params.items():
            if len(value) > MAX_PARAM_CHARACTERS:
                self.text(value, f"params/{key}.txt")
                value = f"{len(value)} characters: see the artifact params/{key}.txt"
            logged.append(Param(key, value))
        for first in range(0, len(logged), BATCH_PARAMS):
            part = logged[first : first + BATCH_PARAMS]
            insist(self._store, "store parameters", partial(self._client.log_batch, self.run_id, params=part))

    def _flush(self) -> None:
        """Send what waits; a point leaves the buffer only after the store has taken it."""
        with self._sending:
            while True:
                with self._buffer_lock:
                    batch = self._buffer[:BATCH_POINTS]
                if not batch:
                    return
                self._client.log_batch(self.run_id, metrics=batch)
                with self._buffer_lock:
                    del self._buffer[: len(batch)]

    def _flush_often(self) -> None:
        warned, pause = False, FLUSH_EVERY_S
        while not self._closing.is_set():
            # While the store is away, a full buffer must not hurry.
            (self._wake if pause == FLUSH_EVERY_S else self._closing).wait(pause)
            self._wake.clear()
            try:
                self._flush()
                pause = FLUSH_EVERY_S
            except failures() as error:
                pause = min(pause * 2, 30.0)
                if not warned:
                    logger.warning("%s does not take metrics, keeping them: %s", self._store, reason(error))
                warned = True


def flatten(plain: object) -> dict[str, str]:
    """Every leaf of JSON-like data by its dotted path; empty lists and objects are leaves."""
    # MLflow's server refuses an empty value, so an empty text is shown as "".
    return {key: leaf if isinstance(leaf, str) and leaf else json.dumps(leaf) for key, leaf in dotted.leaves(plain)}


def final_metrics(result: TrialResult) -> dict[str, float]:
    """The numbers of a result that were measured, by the names of their metrics."""
    plain = result.plain()
    for name in TOKENIZERS:  # words, which are tags
        plain["scores"].pop(name)
    benchmarks = ("benchmarks", "benchmark_stderr", "benchmark_rows")
    numbers = {
        f"scores.{part}.{_REFUSED.sub('_', name)}": value
        for part in benchmarks
        for name, value in plain["scores"].pop(part).items()
    }
    numbers |= {f"{part}.{name}": value for part in ("scores", "usage") for name, value in plain[part].items()}
    numbers |= {f"storage.{_REFUSED.sub('_', kind)}": held for kind, held in plain["storage"].items()}
    numbers |= {f"predicted.{name}": gib for name, gib in plain["predicted"].items()}
    names = ["train_loss_final", "eval_loss_best", "steps", "resumed_from_step"]
    names += ["trainable_parameters", "total_parameters", "adapter_bytes"]
    numbers |= {name: plain[name] for name in names}
    return {name: float(value) for name, value in numbers.items() if value is not None}


def final_tags(result: TrialResult) -> dict[str, str]:
    """How a trial ended, and the parts of its provenance by which runs are searched."""
    made = result.provenance
    tags = {"status": result.status, "error": first_line(result.error) if result.status != "finished" else ""}
    tags |= {"device": made.device, "hostname": made.hostname, "num_workers": str(made.num_workers)}
    tags |= {"gpus_per_worker": str(made.gpus_per_worker), "git_commit": made.git_commit or ""}
    tags |= {"model_fingerprint": made.model_fingerprint or "", "data_key": made.data_key or ""}
    tags |= {"started_at": made.started_at}
    for name, settings in (("chosen", result.chosen), ("lowered_out_of_memory", result.lowered)):
        if settings:
            tags[name] = json.dumps(settings)
    tags |= {name: used for name in TOKENIZERS if (used := getattr(result.scores, name)) is not None}
    tags |= {f"version.{name}": made.versions.get(name, "") for name in _MAIN_VERSIONS}
    return {f"ray_peft.{name}": value for name, value in tags.items()}


def _cell(value: object) -> object:
    """A table's value; JSON has no NaN and no infinity, so they become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
