"""Tracking with several processes, and through a real server and its outages."""

import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from served import Wire
from tracked import client_of, free_port, loaded_table, result_of, spec_of, tracker_of, wait_for
from writers import write_at_once

from ray_peft.errors import TrackingError
from ray_peft.metrics.scores import Scores
from ray_peft.store.tracking import (
    default_uri,
    finish_sweep,
    load_spec,
    open_store,
    start_sweep,
    ui_command,
    ui_environment,
)


def test_three_processes_create_and_fill_one_database_without_loss(tmp_path):
    write_at_once(default_uri(tmp_path), tmp_path, writers=3, steps=50)


@pytest.fixture
def server_port(empty_database: Path, tmp_path: Path) -> Iterator[int]:
    """The port of a real MLflow server over a SQLite file, started as the command line starts its UI."""
    served = tmp_path / "served"
    served.mkdir()
    shutil.copy(empty_database, served / "mlflow.db")
    port = free_port()
    command = ui_command(default_uri(served), served / "artifacts", "127.0.0.1", port)
    with (served / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, env=ui_environment(), cwd=served, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def healthy() -> bool:
        assert process.poll() is None, (served / "log.txt").read_text()
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
        return False

    try:
        wait_for(healthy, timeout_s=120)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_trial_through_a_server_survives_an_outage(server_port, tmp_path, caplog, capfd):
    wire, spec = Wire(server_port), spec_of(seed=3)
    store = open_store(f"http://me:secret@127.0.0.1:{wire.port}", "comparison", None)
    parent = start_sweep(store, "small", tags={}, files={"space.yaml": "seed: 3\n"})
    tracker = tracker_of(tmp_path, store, parent)
    run_id = tracker.start(spec)
    tracker.log({"loss": math.nan, "high": math.inf}, 0)
    wire.cut()
    with caplog.at_level(logging.WARNING, logger="ray_peft"):
        for step in range(1, 300):
            tracker.log({"loss": float(step)}, step)
        wait_for(lambda: "keeping them" in caplog.text)
    wire.mend()
    tracker.table([{"prompt": "a"}], "samples.json")
    tracker.record(result_of(spec, scores=Scores(bleu4=0.5)))
    finish_sweep(store, parent, "FINISHED", metrics={"trials": 1}, files={})

    client = client_of(store)
    history = sorted(client.get_metric_history(run_id, "loss"), key=lambda point: point.step)
    assert [point.step for point in history] == list(range(300))
    assert math.isnan(history[0].value)
    run = client.get_run(run_id)
    assert run.data.metrics["high"] == sys.float_info.max
    assert (run.info.status, run.data.metrics["scores.bleu4"]) == ("FINISHED", 0.5)
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert loaded_table(store, run_id, "samples.json", tmp_path)["prompt"].tolist() == ["a"]
    assert load_spec(store.uri, run_id) == spec
    assert "secret" not in caplog.text + "".join(capfd.readouterr())
    with pytest.raises(TrackingError, match="cannot read run"):
        load_spec(store.uri, "0123456789abcdef0123456789abcdef")
    wire.cut()


def test_something_else_on_the_port_is_named(tmp_path):
    command = [sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as other:
        assert other.stdout is not None
        port = other.stdout.readline().split("port ")[1].split()[0]
        try:
            with pytest.raises(TrackingError, match=r"is not a working MLflow server \(HTTP 501\)"):
                open_store(f"http://127.0.0.1:{port}", "comparison", None)
        finally:
            other.kill()


def test_a_server_needs_no_ui_command():
    with pytest.raises(TrackingError, match=r"http://\*\*\*@host:5000 is an MLflow server"):
        ui_command("http://me:secret@host:5000", None, "127.0.0.1", 5001)
