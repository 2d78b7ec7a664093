"""A store of another MLflow is told at once, with the way out."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing

import pytest

from ray_peft.errors import TrackingError
from ray_peft.store.tracking import default_uri, open_store
from ray_peft.store.tracking.store import _known_schemas, connect


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (lambda: _known_schemas()[3], r"Make a backup of it, then run: mlflow db upgrade sqlite:////.*mlflow.db "),
        (lambda: "ffffffffffff", r"was written by a newer version of MLflow \(schema ffffffffffff\) .*update MLflow"),
    ],
)
def test_another_schema_is_told_at_once(tmp_path, empty_database, schema, words):
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    uri = default_uri(tmp_path)
    assert open_store(uri, "x", tmp_path).uri == uri
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (schema(),))
        connection.commit()
    begin = time.monotonic()
    for use in (lambda: open_store(uri, "x", tmp_path), lambda: connect(uri)):
        with pytest.raises(TrackingError, match=words):
            use()
    assert time.monotonic() - begin < 5
