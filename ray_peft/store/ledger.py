"""The output folder of a sweep: which trials are done, by content hash; survives kill -9."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray_peft.errors import SearchSpaceError
from ray_peft.foundation.json_lines import drop_torn_line
from ray_peft.foundation.locks import locked
from ray_peft.foundation.names import one_part
from ray_peft.foundation.storage import writing
from ray_peft.foundation.whole import write_text
from ray_peft.store.results_file import read_results
from ray_peft.trial.result import TrialResult

JOURNAL = "search.journal"
"""What a search has proposed, by Optuna's own format."""
ADDED = "added.json"
"""Trials that a user added while the sweep ran; beside `sweep.json`."""
WAY_OUT = "free some space, or give another --out; the same command then runs what is missing"


@dataclass
class SweepRecord:
    """What `sweep.json` says of a sweep."""

    name: str
    description: str
    notes: list[str] = field(default_factory=list)
    planned: list[str] = field(default_factory=list)
    """Trial ids, in order."""
    parent_run_id: str | None = None
    tracking_uri: str = ""
    """Without credentials."""
    report: dict[str, Any] = field(default_factory=dict)
    """What the search space says of its report, as JSON-like data."""


class Ledger:
    """Results of one output folder. One process writes at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._results = self.folder / "results.jsonl"
        self.record_file = self.folder / "sweep.json"
        """Written before the first trial starts."""

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            SearchSpaceError: it cannot be written, or another process holds it.
        """
        with contextlib.ExitStack() as holding:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                holding.enter_context(locked(self.folder / ".lock"))
            except TimeoutError:
                raise SearchSpaceError(
                    f"--out {self.folder}: another ray-peft is writing there; wait for it, or give another --out"
                ) from None
            except OSError as error:
                raise SearchSpaceError(f"--out {self.folder}: cannot be written: {error.strerror}") from None
            yield

    def trial_folder(self, trial_id: str) -> Path:
        """The folder of one trial.

        Raises:
            ValueError: the id is no part of a path.
        """
        return self.folder / "trials" / one_part(trial_id)

    def finished(self) -> dict[str, TrialResult]:
        """Trials that need not run again."""
        return {result.trial_id: result for result in self.results() if result.status == "finished"}

    def results(self) -> list[TrialResult]:
        """The last result of every trial, in the order of their first."""
        return read_results(self.folder) if self._results.is_file() else []

    def add(self, result: TrialResult) -> None:
        """Append a result so that a crash at any moment loses at most the line being written.

        Raises:
            StorageError: the system refuses.
        """
        line = (json.dumps(result.row(), ensure_ascii=False) + "\n").encode()
        with writing(self._results, WAY_OUT):
            drop_torn_line(self._results)
            whole = self._results.stat().st_size if self._results.exists() else 0
            try:
                with self._results.open("ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self._results, whole)  # a full disk takes half a line
                raise

    def set_aside(self) -> None:
        """Keep earlier results under another name and start from none."""
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        journal = self.folder / JOURNAL
        if journal.is_file():
            journal.rename(journal.with_stem(f"{journal.stem}-{stamp}"))
        if self._results.is_file():
            self._results.rename(self.folder / f"results-{stamp}.jsonl")
            if (self.folder / "trials").is_dir():
                (self.folder / "trials").rename(self.folder / f"trials-{stamp}")
        for path in (self.record_file, self.folder / ADDED):
            path.unlink(missing_ok=True)

    def read_record(self) -> SweepRecord | None:
        """What an earlier run of the sweep wrote; None where there is none.

        Raises:
            SearchSpaceError: the file is not one of ours.
        """
        if not self.record_file.is_file():
            return None
        try:
            return SweepRecord(**json.loads(self.record_file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise SearchSpaceError(
                f"{self.record_file}: is no record of a sweep of this version ({error}); "
                "give another --out, or use --fresh"
            ) from None

    def write_record(self, record: SweepRecord) -> None:
        """Write `sweep.json` in one step.

        Raises:
            StorageError: the system refuses.
        """
        text = json.dumps(asdict(record), ensure_ascii=False, indent=2) + "\n"
        with writing(self.record_file, WAY_OUT):
            write_text(self.record_file, text)
