"""A repeat with nothing changed leaves everything as it is; any change is seen, whatever it is."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import example_sweep
import pytest

from ray_peft.console import Console
from ray_peft.schedule import repeats
from ray_peft.schedule.experiment import open_experiment
from ray_peft.store.ledger import Ledger
from ray_peft.store.progress import driving
from ray_peft.store.tracking import default_uri, is_closed, open_store
from ray_peft.tasks import remembered
from ray_peft.tasks.files import _bytes as files_of_this_process
from ray_peft.trial.result import TrialResult


class Closed:
    """A finished sweep with its report and its run."""

    def __init__(self, folder: Path, database: Path) -> None:
        shutil.copy(database, folder / "mlflow.db")
        self.uri = default_uri(folder)
        store = open_store(self.uri, "sweep", folder / "artifacts")
        self.ledger = Ledger(example_sweep.build(folder / "out", seeds=(1,), rows=5))
        lines = (self.ledger.folder / "results.jsonl").read_text().splitlines(keepends=True)
        good = [line for line in lines if json.loads(line)["status"] == "finished"]
        (self.ledger.folder / "results.jsonl").write_text("".join(good))
        (self.ledger.folder / "sweep.json").unlink()
        self.rows: list[TrialResult] = self.ledger.results()
        planned = [row.trial_id for row in self.rows]
        quiet = Console(quiet=True)
        opened = open_experiment(
            "sweep", "", self.ledger, store=store, planned=planned, notes=["a note"], console=quiet
        )
        with driving(self.ledger.folder):
            opened.finish(planned, interrupted=False)
        self.record = opened.record
        self.artifacts = folder / "artifacts"

    def seen(self) -> bool:
        """Whether a repeat has nothing to do."""
        files_of_this_process.cache_clear()  # as in a process of its own
        return repeats.is_closed(self.ledger, self.record, self.rows, self.uri, "sweep")


@pytest.fixture(scope="module")
def original(tmp_path_factory, empty_database):
    folder = tmp_path_factory.mktemp("repeats")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_PEFT_CACHE", str(folder / "cache"))
        return folder, Closed(folder, empty_database)


@pytest.fixture
def sweep(original, tmp_path, monkeypatch):
    """The sweep, to be changed; it is put back afterwards."""
    folder, closed = original
    monkeypatch.setenv("RAY_PEFT_CACHE", str(folder / "cache"))
    shutil.copytree(folder, tmp_path / "kept")
    yield closed
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "kept", folder)


def test_nothing_changed(sweep):
    assert sweep.seen()


def same_size_and_time(file: Path) -> None:
    stat, content = file.stat(), file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "name",
    ["report.md", "report.html", "report.csv", "plots/*.svg", "trials/*/answers.jsonl", "trials/*/metrics.jsonl"],
)
def test_a_file_of_the_sweep_changed(sweep, name):
    same_size_and_time(next(iter(sweep.ledger.folder.glob(name))))
    assert not sweep.seen()


@pytest.mark.parametrize("name", ["report.md", "report.html", "plots"])
def test_a_part_of_the_report_is_gone(sweep, name):
    path = sweep.ledger.folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not sweep.seen()


def test_a_row_was_added(sweep):
    sweep.ledger.add(sweep.rows[0].model_copy(update={"error": "of another run"}))
    assert not sweep.seen()


@pytest.mark.parametrize(
    "change",
    [
        {"notes": []},
        {"name": "other"},
        {"description": "Other."},
        {"report": {"loss_steps": [3]}},
        {"tracking_uri": "sqlite:///elsewhere.db"},
        {"parent_run_id": None},
    ],
)
def test_the_search_space_says_something_else(sweep, change):
    assert sweep.seen()
    same = sweep.record
    sweep.record = replace(same, **change)
    try:
        assert not sweep.seen()
    finally:
        sweep.record = same


def test_fewer_trials_are_planned(sweep):
    record, rows = sweep.record, sweep.rows
    sweep.record, sweep.rows = replace(record, planned=record.planned[:-1]), rows[:-1]
    try:
        assert not sweep.seen()
    finally:
        sweep.record, sweep.rows = record, rows


def test_a_result_that_the_store_lacks_is_no_whole_sweep(sweep):
    rows = sweep.rows
    sweep.rows = [rows[0].model_copy(update={"untracked": "disk full"}), *rows[1:]]
    try:
        assert not sweep.seen()
    finally:
        sweep.rows = rows


def test_another_release_writes_its_own_report(sweep, monkeypatch):
    monkeypatch.setattr(remembered, "program", lambda: "of the next release")
    assert not sweep.seen()


class TestTheStore:
    """What became of the sweep's run is read from the store each time."""

    @pytest.mark.parametrize(
        "change",
        [
            "UPDATE runs SET status = 'RUNNING'",
            "UPDATE runs SET lifecycle_stage = 'deleted'",
            "UPDATE experiments SET lifecycle_stage = 'deleted'",
            "DELETE FROM runs",
            "ALTER TABLE runs RENAME TO runs_of_another_version",
        ],
    )
    def test_the_run_is_not_as_it_was_closed(self, sweep, change):
        # Not by a client of mlflow: it keeps the file open, which the fixture replaces.
        with closing(sqlite3.connect(sweep.uri.removeprefix("sqlite:///"))) as connection, connection:
            connection.execute(change)
        assert not sweep.seen()

    def test_the_artifacts_are_gone(self, sweep):
        shutil.rmtree(sweep.artifacts)
        assert not sweep.seen()

    def test_another_experiment_is_named(self, sweep):
        assert not is_closed(sweep.uri, "other", sweep.record.parent_run_id, "report.md")

    def test_no_store_no_server_and_no_sqlite_file_are_asked_in_full(self, sweep, tmp_path):
        (tmp_path / "text.db").write_text("no database")
        for uri in (f"sqlite:///{tmp_path}/none.db", f"sqlite:///{tmp_path}/text.db", "http://127.0.0.1:9", "file:x"):
            assert not is_closed(uri, "sweep", sweep.record.parent_run_id, "report.md")
        assert not (tmp_path / "none.db").exists()
