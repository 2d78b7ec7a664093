"""What the tests of tracking share: a trial with its result, and a look into a store."""

from __future__ import annotations

import contextlib
import random
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_peft.spec import TrialSpec
from ray_peft.store.tracking import Store, TrialTracker, is_sent
from ray_peft.trial.result import TrialResult


def client_of(store: Store) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store.uri)


def spec_of(seed: int = 42, path: str = "dolly.jsonl") -> TrialSpec:
    return TrialSpec.from_plain(
        {
            "model": {"name": "some/model"},
            "data": {"sources": [{"recipe": "dolly", "path": path, "train": 8, "test": 2}]},
            "method": {"name": "lora", "rank": 4},
            "train": {"steps": 3},
            "seed": seed,
        }
    )


def result_of(spec: TrialSpec, **fields: Any) -> TrialResult:
    return TrialResult(**{"trial_id": spec.trial_id, "status": "finished", "spec": spec, "steps": 3, **fields})


def tracker_of(folder: Path, store: Store, parent: str | None) -> TrialTracker:
    """A tracker of a trial in a new folder."""
    return TrialTracker(store, parent, "small", Path(tempfile.mkdtemp(dir=folder)) / "trial")


def settle(tracker: TrialTracker) -> None:
    """Wait until the store has what a tracker was given."""
    wait_for(lambda: is_sent(tracker._store, tracker._folder))


def artifact_text(store: Store, run_id: str, name: str, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    return Path(client_of(store).download_artifacts(run_id, name, str(folder))).read_text(encoding="utf-8")


def wait_for(condition: Callable[[], bool], timeout_s: float = 15) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "nothing happened in time"
        time.sleep(0.05)


def free_port() -> int:
    """A port for a server that starts in a moment, between Ray's workers' and those that Linux gives to anybody."""
    for port in random.SystemRandom().sample(range(20000, 32768), 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def loaded_table(store: Store, run_id: str, name: str, folder: Path) -> Any:
    """As `MlflowClient.load_table` does, which in 3.17 asks the global store in place of the client's own."""
    import pandas

    query = f"""tags.mlflow.loggedArtifacts LIKE '%"path"%:%"{name}",%"type"%:%"table"%'"""
    assert [run.info.run_id for run in client_of(store).search_runs([store.experiment_id], query)] == [run_id]
    artifact_text(store, run_id, name, folder)
    return pandas.read_json(folder / name, orient="split")
