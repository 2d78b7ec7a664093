"""A sweep that is called again with nothing changed: its report and its MLflow run stay as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ray_peft.report.files import REPORT
from ray_peft.store import tracking
from ray_peft.store.ledger import Ledger, SweepRecord
from ray_peft.store.progress import DRIVER_FILE
from ray_peft.tasks.files import content_of
from ray_peft.tasks.model_content import WEIGHTS
from ray_peft.tasks.remembered import Mark
from ray_peft.trial.result import DONE, TrialResult


def close(ledger: Ledger, record: SweepRecord, results: Sequence[TrialResult]) -> None:
    """Remember that a sweep's folder and its run say all there is to say, if they do."""
    if _is_whole(record, results):
        _mark(ledger, record).write({})


def is_closed(ledger: Ledger, record: SweepRecord, results: Sequence[TrialResult], uri: str, experiment: str) -> bool:
    """Whether a call that runs no trial would write what is there already.

    Args:
        ledger: of the sweep's folder.
        record: what this call would write into it.
        results: the rows of all planned trials.
        uri: of the tracking store.
        experiment: in it.
    """
    if record.parent_run_id is None or not _is_whole(record, results) or ledger.read_record() != record:
        return False
    if not tracking.is_closed(uri, experiment, record.parent_run_id, REPORT):
        return False
    return _mark(ledger, record).read() is not None


def _is_whole(record: SweepRecord, results: Sequence[TrialResult]) -> bool:
    finished = [result.trial_id for result in results if result.status in DONE and result.untracked is None]
    return finished == record.planned


def _mark(ledger: Ledger, record: SweepRecord) -> Mark:
    return Mark("closed", [record.tracking_uri, str(ledger.folder), _content(ledger.folder)])


def _content(folder: Path) -> str:
    """Digest of all files in and below a sweep's folder: content, or of weights size and time.

    What the driver says of itself is left out: it says last, after the sweep was closed, that it has ended.
    """
    digest = hashlib.sha256()
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != DRIVER_FILE)
    for file in sorted(path for path in paths if not path.name.startswith(".")):
        stat = file.stat()
        state = f"{stat.st_size} {stat.st_mtime_ns}" if file.suffix in WEIGHTS else content_of(file)
        digest.update(f"{file.relative_to(folder).as_posix()}:{state}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
