"""Whether a sweep's run is closed and whole in a local store, read without mlflow, whose import takes seconds."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from ray_peft.errors import TrackingError
from ray_peft.store.tracking.store import is_server, sqlite_file

_RUN = """
    SELECT runs.artifact_uri FROM runs JOIN experiments USING (experiment_id)
    WHERE runs.run_uuid = ? AND runs.status = 'FINISHED' AND runs.lifecycle_stage = 'active'
    AND experiments.name = ? AND experiments.lifecycle_stage = 'active'
"""


def is_closed(uri: str, experiment: str, run_id: str, artifact: str) -> bool:
    """True if the store is a SQLite file in which the run finished, and the run's artifact is there.

    Also False where that is unknown: for a server, or a store of another version of MLflow.
    """
    if is_server(uri):
        return False
    try:
        path = sqlite_file(uri)
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            row = connection.execute(_RUN, (run_id, experiment)).fetchone()
    except (TrackingError, sqlite3.Error):
        return False
    if row is None:
        return False
    place = urlparse(str(row[0]))
    return place.scheme in ("", "file") and (Path(url2pathname(place.path)) / artifact).is_file()
