"""Processes that write to one tracking store at once, each as a trial of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tracked import client_of, spec_of

from ray_peft.store.tracking import open_store

_CODE = """
import json, os, sys, traceback
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store
from ray_peft.trial.result import TrialResult
from ray_peft.spec import TrialSpec
from ray_peft.store.tracking import TrialTracker, open_store

uri, outputs, plain = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
writers, steps = map(int, sys.argv[4:])

def write(writer):
    store = open_store(uri, "comparison", outputs / "artifacts")
    spec = TrialSpec.from_plain(json.loads(plain)).model_copy(update={"seed": writer})
    tracker = TrialTracker(store, None, "small", outputs / f"trial{writer}")
    tracker.start(spec)
    for step in range(steps):
        tracker.log({"loss": float(step), "lr": 1.0}, step)
        tracker._send(60.0)
    tracker.record(TrialResult(trial_id=spec.trial_id, status="finished", spec=spec))

children = []
for writer in range(writers):
    child = os.fork()
    if child == 0:
        try:
            write(writer)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def write_at_once(uri: str, folder: Path, *, writers: int, steps: int) -> None:
    """Let `writers` processes open the store and send `steps` reports each; nothing may be lost or stored twice."""
    arguments = [uri, str(folder), spec_of().model_dump_json(), str(writers), str(steps)]
    done = subprocess.run(
        [sys.executable, "-c", _CODE, *arguments],
        cwd=Path(__file__).parents[1], env=dict(os.environ), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "INFO" not in done.stderr
    store = open_store(uri, "comparison", folder)
    client = client_of(store)
    runs = client.search_runs([store.experiment_id])
    assert sorted(int(run.data.params["seed"]) for run in runs) == list(range(writers))
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        points = client.get_metric_history(run.info.run_id, "loss")
        assert sorted(point.step for point in points) == list(range(steps))
