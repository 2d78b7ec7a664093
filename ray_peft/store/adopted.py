"""Rows that workers left in their trials' folders, and that never reached the driver's ledger."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from pydantic import ValidationError

from ray_peft.foundation.whole import write_text
from ray_peft.store.ledger import Ledger
from ray_peft.trial.result import DONE, RESTARTS_FILE, RESULT_FILE, TrialResult

logger = logging.getLogger(__name__)


def left_row(folder: Path, trial_id: str) -> TrialResult | None:
    """The row that a trial's worker left in its folder; None if there is none, or if it cannot be read."""
    path = folder / RESULT_FILE
    try:
        row = TrialResult.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        logger.warning("%s cannot be read, and is passed over: %s", path, error)
        return None
    return row if row.trial_id == trial_id else None


def restarts(folder: Path) -> list[str]:
    """Why earlier attempts of a trial ended in this sweep."""
    path = folder / RESTARTS_FILE
    return [str(line) for line in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def note_restart(folder: Path, reason: str) -> None:
    """Note why an attempt ended, for the row of the next one."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESTARTS_FILE, json.dumps([*restarts(folder), reason]))


def make_way(folder: Path, trial_id: str, *, again: bool = False) -> None:
    """Remove the row of an earlier attempt, unless it finished: a trial that finished need not run again.

    Args:
        folder: the trial's own.
        trial_id: its id.
        again: the attempt was one of this sweep: a row that it was stopped early stands, too.
    """
    row = left_row(folder, trial_id)
    if row is None or not (row.status == "finished" or (again and row.status in DONE)):
        (folder / RESULT_FILE).unlink(missing_ok=True)


def adopt(ledger: Ledger) -> list[TrialResult]:
    """Add to the ledger the rows that it lacks, as after a driver that was killed; returns them.

    Raises:
        StorageError: the ledger cannot be written.
    """
    known = {row.trial_id: row.status for row in ledger.results()}
    adopted = []
    for path in sorted((ledger.folder / "trials").glob(f"*/{RESULT_FILE}")):
        trial_id = path.parent.name
        if known.get(trial_id) in DONE:
            continue
        row = left_row(path.parent, trial_id)
        if row is not None and (row.status in DONE or trial_id not in known):
            ledger.add(row)
            adopted.append(row)
    return adopted
