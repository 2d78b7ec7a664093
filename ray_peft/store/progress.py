"""How far a sweep is, read from its folder alone; the sweep may run on another machine."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ray_peft.errors import DataError
from ray_peft.foundation.json_lines import GrowingFile
from ray_peft.foundation.measured import from_json
from ray_peft.foundation.regularly import regularly
from ray_peft.foundation.storage import writing
from ray_peft.trial.live import CANCEL_FILE, LIVE_FILE

DRIVER_FILE = "driver.json"
DRIVEN = ("running", "paused")
"""What a driver says of itself while it drives."""
BEAT_S = 5.0
SILENT_S = 60.0
"""Whoever has written nothing for so long is taken for dead: clocks of two machines may differ by some of it."""


@dataclass(frozen=True)
class TrialProgress:
    """One trial."""

    trial_id: str
    method: str = ""
    state: str = "waiting"
    """waiting; load, train, save or evaluate; silent, if nothing was heard of it for long; then its row's status."""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    """The last train loss; of a trial with a row, its held-out loss."""
    tokens_per_s: float | None = None
    memory_gib: float | None = None
    room_gib: float | None = None
    """What it may take of its GPU; None on the CPU."""
    left_s: float | None = None
    """Seconds of training left at the speed of the last steps."""
    predicted_gib: float | None = None
    """The peak of its GPU's memory as predicted; None on the CPU, or where that is not known."""
    host: str = ""
    place: str = ""
    """The host with the GPU, or CPU, that it runs or ran on."""
    began: float | None = None
    """Unix time [s] of its start, or that of its last attempt; None where that is not known."""
    ended: float | None = None
    """And of its end; None while it runs."""


@dataclass(frozen=True)
class Progress:
    """A sweep."""

    name: str
    driver: str
    """running, paused, ended, silent if nothing was heard of it for long, or unknown: of an older version."""
    trials: list[TrialProgress] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """True if nothing more will come."""
        return self.driver in ("ended", "silent") or (self.driver == "unknown" and all(map(has_row, self.trials)))

    def plain(self) -> dict[str, Any]:
        """As JSON-like data."""
        return {"name": self.name, "driver": self.driver, "trials": [asdict(trial) for trial in self.trials]}


def has_row(trial: TrialProgress) -> bool:
    """Whether a trial has ended."""
    return trial.state in ("finished", "stopped_early", "failed", "out_of_memory", "cancelled")


class Driver:
    """What the driver of a sweep says of itself in the sweep's folder; a disk that is full stops nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writing = threading.Lock()
        self.paused = False

    def pause(self, *, paused: bool) -> None:
        """Say whether trials are to run."""
        self.paused = paused
        self.beat()

    def beat(self, state: str = "") -> None:
        """Say that it is there."""
        state = state or ("paused" if self.paused else "running")
        text = json.dumps({"state": state, "at": time.time(), "host": platform.node(), "pid": os.getpid()})
        with self._writing, contextlib.suppress(OSError):
            temporary = self._folder / f".{DRIVER_FILE}.tmp"
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self._folder / DRIVER_FILE)


@contextlib.contextmanager
def driving(folder: Path) -> Iterator[Driver]:
    """Say in the sweep's folder that its driver runs, until it has ended."""
    for request in folder.glob(f"trials/*/{CANCEL_FILE}"):  # of an earlier run of the sweep
        request.unlink(missing_ok=True)
    driver = Driver(folder)
    driver.beat()
    try:
        with regularly(driver.beat, BEAT_S, "driver-beat"):
            yield driver
    finally:
        driver.beat("ended")


def cancel(folder: Path, trial_id: str) -> None:
    """Ask a trial of a running sweep to end, wherever it runs: it looks for this file at every step that it logs.

    Who may write into the sweep's folder may do so, and nobody else.

    Raises:
        DataError: the trial has a row, or the sweep does not know it.
        StorageError: the folder cannot be written.
    """
    progress = Reader(folder).read()
    trial = next((trial for trial in progress.trials if trial.trial_id == trial_id), None)
    if trial is None:
        raise unknown_trial(folder, trial_id)
    if has_row(trial):
        raise DataError(f"{folder}: trial {trial_id} has ended by itself: {trial.state}")
    if progress.ended:
        raise DataError(f"{folder}: the sweep does not run, so there is nothing to cancel")
    path = folder / "trials" / trial_id / CANCEL_FILE
    with writing(path, "cancel it as the user that runs the sweep"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)


def unknown_trial(folder: Path, trial_id: str) -> DataError:
    """What to raise where a sweep has no such trial."""
    return DataError(f"{folder}: has no trial {trial_id}; its trials: ray-peft ctl {folder} list")


def newest(outputs: Path) -> Path | None:
    """The sweep of which a driver has told last, of all below a folder; None if there is none."""
    driver_files = [
        path for pattern in (DRIVER_FILE, f"*/{DRIVER_FILE}", f"*/*/{DRIVER_FILE}") for path in outputs.glob(pattern)
    ]
    return max(driver_files, key=lambda path: path.stat().st_mtime).parent if driver_files else None


class Reader:
    """Reads a sweep's folder again and again."""

    def __init__(self, folder: Path) -> None:
        """Prepare to read.

        Raises:
            DataError: the folder is not one of a sweep.
        """
        self._folder = folder
        self._rows: dict[str, TrialProgress] = {}
        self._results = GrowingFile(folder / "results.jsonl")
        if not (folder / "sweep.json").is_file() and not (folder / DRIVER_FILE).is_file():
            raise DataError(f"{folder}: holds no sweep; give the folder of one, such as outputs/quickstart")

    def read(self) -> Progress:
        """How far the sweep is now."""
        record = _json(self._folder / "sweep.json")
        self._take_rows()
        planned = dict.fromkeys([*record.get("planned", []), *self._rows])
        return Progress(
            str(record.get("name", self._folder.name)),
            self.driver(),
            [self._trial(str(trial_id)) for trial_id in planned],
        )

    def driver(self) -> str:
        """What the driver says of itself; as in `Progress`."""
        record = _json(self._folder / DRIVER_FILE)
        if not record:
            return "unknown"
        silent = record["state"] != "ended" and time.time() - float(record["at"]) > SILENT_S
        return "silent" if silent else str(record["state"])

    def _trial(self, trial_id: str) -> TrialProgress:
        row = self._rows.get(trial_id)
        if row is not None and row.state == "finished":
            return row
        live = _json(self._folder / "trials" / trial_id / LIVE_FILE)
        if not live:
            return row or TrialProgress(trial_id)
        age = time.time() - float(live["at"])
        left = live.get("left_s")
        loss = live["metrics"].get("train_loss", live["metrics"].get("eval_loss"))
        return TrialProgress(
            trial_id=trial_id,
            method=str(live["method"]),
            state="silent" if age > SILENT_S else str(live["phase"] or "load"),
            step=live["step"],
            steps=live["steps"],
            loss=loss,
            tokens_per_s=live["tokens_per_s"],
            memory_gib=live["memory_gib"],
            room_gib=live["room_gib"],
            left_s=max(0.0, float(left) - age) if left is not None else None,
            predicted_gib=live.get("predicted_gib"),
            host=str(live["host"]),
            place=place_name(live.get("gpu"), str(live["host"]), on_gpu=str(live["device"]) != "cpu"),
            began=float(live["began"]),
        )

    def _take_rows(self) -> None:
        """Read the rows that were added; a last line that is being written waits."""
        lines, began_again = self._results.new_lines()
        if began_again:  # set aside by `--fresh`
            self._rows = {}
        for line in lines:
            if line.strip():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    row = _ended(json.loads(line))
                    self._rows[row.trial_id] = row


def _ended(row: dict[str, Any]) -> TrialProgress:
    usage, scores, provenance = (row.get(part) or {} for part in ("usage", "scores", "provenance"))
    began = _unix(provenance.get("started_at"))
    ended = _unix(provenance.get("ended_at"))
    host = str(provenance.get("hostname", ""))
    memory = usage.get("peak_reserved_gib") or usage.get("peak_rss_gib")
    return TrialProgress(
        trial_id=str(row["trial_id"]),
        method=str(((row.get("spec") or {}).get("method") or {}).get("name", "")),
        state=str(row["status"]),
        step=row.get("steps"),
        steps=row.get("steps"),
        loss=from_json(scores.get("eval_loss")),
        tokens_per_s=usage.get("tokens_per_s"),
        memory_gib=memory,
        predicted_gib=(row.get("predicted") or {}).get("peak_reserved_gib"),
        host=host,
        place=place_name(provenance.get("gpu"), host, on_gpu=usage.get("peak_reserved_gib") is not None),
        began=began,
        ended=ended if ended is not None or began is None else began + float(usage.get("wall_time_s") or 0.0),
    )


def place_name(gpu: str | None, host: str, *, on_gpu: bool) -> str:
    """What to call the GPU with this number or UUID on a machine, or its CPU; None: which GPU it was is not known."""
    return f"{host} GPU {gpu}".strip() if gpu else f"{host} {'GPU' if on_gpu else 'CPU'}".strip()


def _unix(moment: str | None) -> float | None:
    return datetime.fromisoformat(moment).timestamp() if moment else None


def _json(path: Path) -> dict[str, Any]:
    """The content of a file; nothing if it is not there, or not whole."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
