"""Sends what a tracking store lacks of a folder's trials, after the sweep: `ray-peft sync`."""

from __future__ import annotations

import os
from pathlib import Path

from ray_peft.errors import DataError, TrackingError
from ray_peft.foundation.audience import Audience
from ray_peft.foundation.masking import masked_keys
from ray_peft.schedule.experiment import Experiment
from ray_peft.store import tracking
from ray_peft.store.adopted import adopt
from ray_peft.store.keeping import Rows
from ray_peft.store.ledger import Ledger, SweepRecord
from ray_peft.store.unsent import Unsent


def sync(folder: Path, tracking_uri: str | None, console: Audience) -> dict[str, str]:
    """Send everything that waits beside a sweep's trials, and write and close the sweep's run.

    Args:
        folder: a sweep's, or a single run's.
        tracking_uri: MLflow store; None takes the sweep's own, or MLFLOW_TRACKING_URI where that needs a password.
        console: shows what was sent.

    Returns:
        What the store lacks all the same, by trial, with the reason.

    Raises:
        DataError: the folder holds no sweep.
        TrackingError: the store cannot be reached, or the sweep's run is gone from it.
    """
    if not (folder / "sweep.json").is_file():  # before the lock makes the folder
        raise DataError(f"{folder}: holds no sweep.json; give the folder of a sweep, such as outputs/quickstart")
    ledger = Ledger(folder)
    with ledger.locked():
        record = ledger.read_record()
        assert record is not None
        opened = _opened(ledger, record, tracking_uri, console)
        adopt(ledger)
        opened.take_over({row.trial_id: row for row in ledger.results()}, ())
        finished = {row.trial_id for row in ledger.results()}
        opened.finish(record.planned, interrupted=not finished.issuperset(record.planned))
        return opened.lacking


def _opened(ledger: Ledger, record: SweepRecord, tracking_uri: str | None, console: Audience) -> Experiment:
    own = None if masked_keys({"uri": record.tracking_uri}) else record.tracking_uri
    uri = tracking_uri or own or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise TrackingError(
            f"{record.tracking_uri} needs a password, which sweep.json does not hold; give --tracking-uri, or set "
            "MLFLOW_TRACKING_URI"
        )
    if record.parent_run_id is None:
        raise TrackingError(f"{ledger.folder}: its sweep has no MLflow run yet; run the sweep's own command again")
    try:
        store = tracking.store_of(uri, record.parent_run_id)
    except tracking.MissingError:
        raise TrackingError(
            f"the run of this sweep ({record.parent_run_id}) is gone from the store; the sweep's own command makes it "
            "anew and trains nothing again"
        ) from None
    unsent = Unsent(store, ledger.trial_folder, record.parent_run_id, console)
    return Experiment(record.name, ledger, store, record, console, Rows(ledger, console), unsent)
