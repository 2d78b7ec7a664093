"""One trial's run in its worker: entries for the store go into the trial's outbox, and a thread sends them."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from ray_peft.errors import TrackingError, first_line
from ray_peft.foundation import dotted
from ray_peft.foundation.masking import mask
from ray_peft.spec import TrialSpec
from ray_peft.store.outbox import Outbox
from ray_peft.store.tracking.inputs import group_of
from ray_peft.store.tracking.runs import fetch
from ray_peft.store.tracking.sending import send, sent_to, why_unsent
from ray_peft.store.tracking.store import PATIENCE_S, Store, import_mlflow
from ray_peft.trial.result import TrialResult

logger = logging.getLogger(__name__)

FLUSH_EVERY_S = 2.0
FLUSH_AT_POINTS = 200
MAX_PARAM_CHARACTERS = 6000
SHORT_PATIENCE_S = 3.0
"""How long a call is repeated at a trial's start and end. After that the trial goes on, and its driver sends."""
ANSWER_S = 10.0
"""How long a trial waits at its start, and at its end if there was no answer yet, for a store that keeps silent."""


class TrialTracker:
    """One trial's run. It waits for no store: a store that is away gets everything later, in order."""

    def __init__(self, store: Store, parent_run_id: str | None, sweep: str, folder: Path) -> None:
        """`folder` is the trial's own."""
        self._store, self._parent, self._sweep, self._folder = store, parent_run_id, sweep, folder
        self._outbox = Outbox(folder)
        self._points = 0
        self._reason: str | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._answered = threading.Event()
        """The first attempt to send has ended, one way or the other."""
        # A thread of its own, so that a slow store does not slow down the training that is being measured.
        self._sender = threading.Thread(target=self._send_often, name="mlflow-outbox", daemon=True)

    @property
    def run_id(self) -> str | None:
        """The id of the trial's run; None until the store has made it."""
        return sent_to(self._store, self._folder).run_id

    def start(self, spec: TrialSpec) -> str | None:
        """Open the trial's run with its parameters and spec.json, and return its id; None if the store is away.

        A run of the same trial that a killed process left open is closed as KILLED.
        """
        tags = {"ray_peft.trial_id": spec.trial_id, "ray_peft.method": spec.method.name, "ray_peft.sweep": self._sweep}
        tags["group"] = group_of(spec)
        if (origin := spec.train.warm_start) is not None:
            tags["ray_peft.warm_start"] = f"{origin.trial}, step {origin.step}: not comparable"
        if self._parent is not None:
            tags["mlflow.parentRunId"] = self._parent
        values = {key: mask(value) for key, value in flatten(spec.plain()).items()}
        texts = {f"params/{key}.txt": value for key, value in values.items() if len(value) > MAX_PARAM_CHARACTERS}
        for key, value in values.items():
            if len(value) > MAX_PARAM_CHARACTERS:
                values[key] = f"{len(value)} characters: see the artifact params/{key}.txt"
        texts["spec.json"] = mask(json.dumps(spec.plain(), indent=2))
        self._outbox.put(
            {"do": "start", "token": uuid.uuid4().hex, "tags": tags, "at": _now()},
            {"do": "params", "values": values},
            *({"do": "text", "file": file, "content": content} for file, content in texts.items()),
        )
        import_mlflow()  # so that it does not count as silence, and no two threads import at once
        self._sender.start()
        in_time = self._answered.wait(ANSWER_S)
        return self.run_id if in_time and self._reason is None else None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take live metrics; they reach the store within seconds, or when it is back. Never raises.

        A NaN is stored as such; MLflow's SQL stores turn an infinity into the largest float of its sign.
        """
        self._outbox.put({"do": "metrics", "values": {k: float(v) for k, v in metrics.items()}, "step": int(step),
                          "at": _now()})  # fmt: skip
        self._points += len(metrics)
        if self._points >= FLUSH_AT_POINTS:
            self._points = 0
            self._wake.set()

    def artifact(self, path: Path, folder: str, *, remove: bool = False) -> None:
        """Send a file, or a folder's whole content, to the artifact folder `folder` ("" is the top).

        Args:
            path: stays as it is until the trial is over.
            folder: of the run's artifacts.
            remove: the folder at `path` goes once the store has it.

        Raises:
            TrackingError: nothing is at `path`.
        """
        if not path.exists():
            raise TrackingError(f"cannot store {path} in MLflow: no such file or folder")
        inside = path.is_relative_to(self._folder)
        self._put(
            {
                "do": "artifact",
                "path": str(path.relative_to(self._folder) if inside else path.absolute()),
                "to": folder if path.is_dir() else f"{folder}/{path.name}",
                "remove": remove,
            }
        )

    def table(self, rows: list[dict[str, object]], artifact_file: str) -> None:
        """Send rows so that MLflow's table view shows them and `load_table` reads them.

        Args:
            rows: Equal keys make a column; a missing key is empty.
            artifact_file: A path that ends in .json.
        """
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[_cell(row.get(column)) for column in columns] for row in rows]
        plain = json.loads(json.dumps(data, default=str))
        self._put({"do": "table", "file": artifact_file, "columns": columns, "data": plain})

    def fetch(self, run_id: str, folder: str, to: Path) -> Path:
        """Download the artifact folder of another run into `to` and return its path there.

        Raises:
            TrackingError: the run has no such folder, or the store does not answer.
        """
        return fetch(self._store.uri, run_id, folder, to)

    def record(self, result: TrialResult) -> TrialResult:
        """Send the result, and close the run. It waits while the store takes entries, but not for a store that is away.

        Returns:
            The row with its run's id. Its `untracked` says why the store lacks it; the driver goes on sending then.
        """
        written = self._outbox.put({"do": "result", "row": result.model_dump_json(), "at": _now()})
        self._closing.set()
        self._wake.set()
        self._sender.join(timeout=PATIENCE_S if self._answered.is_set() else ANSWER_S)
        sent = sent_to(self._store, self._folder)
        lacking = not written or self._outbox.waits(sent)
        untracked = why_unsent(self._reason) if lacking else None
        return result.model_copy(update={"mlflow_run_id": sent.run_id, "untracked": untracked})

    def _put(self, entry: dict[str, object]) -> None:
        self._outbox.put(entry)
        self._wake.set()

    def _send(self, patience_s: float) -> None:
        """Send what waits; `_reason` says why not."""
        try:
            send(self._store, self._folder, patience_s=patience_s)
        except TrackingError as error:
            if self._reason is None:
                logger.warning("%s does not take results and metrics, keeping them: %s", self._store, first_line(error))
            self._reason = first_line(error)
        else:
            self._reason = None

    def _send_often(self) -> None:
        self._send(SHORT_PATIENCE_S)
        self._answered.set()
        pause = FLUSH_EVERY_S
        while not self._closing.is_set():
            # While the store is away, a full outbox must not hurry.
            (self._wake if pause == FLUSH_EVERY_S else self._closing).wait(pause)
            self._wake.clear()
            if not self._closing.is_set():
                self._send(0.0)
                pause = FLUSH_EVERY_S if self._reason is None else min(pause * 2, 30.0)
        self._send(SHORT_PATIENCE_S if self._reason is None else 0.0)


def _now() -> int:
    """Milliseconds since 1970, as MLflow takes them."""
    return int(time.time() * 1000)


def flatten(plain: object) -> dict[str, str]:
    """Every leaf of JSON-like data by its dotted path; empty lists and objects are leaves."""
    # MLflow's server refuses an empty value, so an empty text is shown as "".
    return {key: leaf if isinstance(leaf, str) and leaf else json.dumps(leaf) for key, leaf in dotted.leaves(plain)}


def _cell(value: object) -> object:
    """A table's value; JSON has no NaN and no infinity, so they become text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
