"""`ray-peft ui` as a person meets it: a server, a page in a browser, and Ctrl-C."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from tracked import free_port, result_of, spec_of, wait_for

from ray_peft.metrics.scores import Scores
from ray_peft.store.tracking import TrialTracker, default_uri, finish_sweep, open_store, start_sweep

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def swept(tmp_path, empty_database):
    """A store with a sweep of two trials: its URI, its experiment's id, the sweep's run, the trials' runs."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri = default_uri(tmp_path)
    store = open_store(uri, "which_method", tmp_path / "artifacts")
    parent = start_sweep(store, "which_method", tags={}, files={})
    trials = {}
    for seed in (1, 2):
        spec = spec_of(seed)
        tracker = TrialTracker(store, parent, "which_method", tmp_path / f"trial{seed}")
        trials[spec.trial_id] = tracker.start(spec)
        for step in (1, 2, 3):
            tracker.log({"train_loss": 3.0 / step}, step)
        tracker.record(result_of(spec, scores=Scores(eval_loss=1.5 + seed / 100, bleu4=0.25)))
    finish_sweep(store, parent, "FINISHED", metrics={"trials": 2.0}, files={})
    return uri, store.experiment_id, parent, trials


@pytest.fixture
def ui(swept, tmp_path):
    """Address and process of a running `ray-peft ui`."""
    port = free_port()
    command = [sys.executable, "-m", "ray_peft", "ui", "--tracking-uri", swept[0], "--port", str(port)]
    log = tmp_path / "ui.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=output, stderr=output
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: process.poll() is not None or answers(address), 90)
        assert process.poll() is None, log.read_text()
        yield address, process
    finally:
        for each in family(process):
            each.kill()
        process.wait()


def family(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    """The process, unless it has ended, and all below it."""
    if process.poll() is not None:
        return []
    parent = psutil.Process(process.pid)
    return [*parent.children(recursive=True), parent]


def answers(address: str) -> bool:
    try:
        return fetch(f"{address}/health") == "OK"
    except OSError:
        return False


def fetch(url: str, question: dict[str, Any] | None = None) -> str:
    request = urllib.request.Request(url, json.dumps(question).encode() if question else None)
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return answer.read().decode()


def browse(url: str, profile: Path, *flags: str) -> str:
    """What Chromium prints of a page."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}", "--virtual-time-budget=20000", "--window-size=1600,1000", *flags, url,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_ui_shows_a_sweep_with_its_trials_and_ends_on_ctrl_c(swept, ui, tmp_path):
    _, experiment_id, parent, trials = swept
    address, process = ui
    assert "<title>MLflow</title>" in fetch(address)
    found = json.loads(fetch(f"{address}/api/2.0/mlflow/runs/search", {"experiment_ids": [experiment_id]}))["runs"]
    tags = {run["info"]["run_id"]: {tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in found}
    assert set(tags) == {parent, *trials.values()}
    assert {tags[run_id]["mlflow.parentRunId"] for run_id in trials.values()} == {parent}

    if CHROMIUM:  # what no HTTP answer shows: that the page draws them
        pages = {
            "sweep": f"runs/{parent}",  # lists its child runs; the page of all runs folds them under it ...
            "ranking": "runs?orderByKey=metrics.%60scores.eval_loss%60&orderByAsc=true",  # ... unless sorted by one
        }
        for name, page in pages.items():
            picture = tmp_path / f"{name}.png"
            url = f"{address}/#/experiments/{experiment_id}/{page}"
            drawn = browse(url, tmp_path / f"{name} profile", "--dump-dom", f"--screenshot={picture}")
            assert all(trial_id in drawn for trial_id in trials), name
            assert picture.stat().st_size > 20_000

    below = family(process)[:-1]
    assert below
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0
    assert not [each for each in below if each.is_running()]
