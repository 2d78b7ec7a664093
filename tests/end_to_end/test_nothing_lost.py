"""One trial that goes wrong, or a store that goes away: the other trials run, and what finished is kept."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import yaml
from mlflow import MlflowClient

import ray_peft
from ray_peft import cli
from ray_peft.console import Console
from ray_peft.store.results_file import read_results

ROOT = Path(__file__).resolve().parents[2]
LORA = {"name": "lora", "rank": 4, "lr": 0.01}
BREAKS = {
    "name": "qlora_galore",
    "switch_at": 0.25,
    "qlora": {"rank": 4, "lr": 1.0e30, "max_grad_norm": None, "compute_dtype": "float32"},
    "galore": {"rank": 8, "lr": 0.01},
}
"""One step of QLoRA makes weights of which the loss at the boundary is NaN."""


def write_space(folder: Path, model: Path, data: Path, methods: list[dict]) -> Path:
    plain = tiny.plain_spec(model, data, {"grid": methods}, evaluation__generate=False)
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"name": "space", **plain}), encoding="utf-8")
    return path


def test_a_loss_that_is_nan_ends_its_own_trial_alone(ray_cluster, tiny_model, questions, tmp_path):
    space = write_space(tmp_path, tiny_model, questions, [LORA, BREAKS, {"name": "none"}])
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert cli.main(["sweep", str(space), "--out", str(tmp_path / "out"), "--tracking-uri", store]) == 1
    rows = read_results(tmp_path / "out")
    assert [(row.spec.method.name, row.status) for row in rows] == [
        ("lora", "finished"), ("qlora_galore", "failed"), ("none", "finished"),
    ]  # fmt: skip
    assert rows[1].error.startswith("the held-out loss is nan after stage 1; lower method.qlora.lr")
    assert [str(loss) for loss in rows[1].boundary_losses.values()] == ["nan"]
    line = (tmp_path / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()[1]
    assert json.loads(line, parse_constant=pytest.fail)["boundary_losses"] == {"after stage 1": "NaN"}
    assert "qlora_galore" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_a_store_that_goes_away_loses_no_row_and_signals_stay_the_caller_s(
    ray_cluster, tiny_model, questions, tmp_path
):
    space = write_space(tmp_path, tiny_model, questions, [{"name": "none"}, LORA])
    out, store = tmp_path / "out", tmp_path / "mlflow.db"

    def take_away() -> None:
        while not (out / "results.jsonl").exists():
            time.sleep(0.02)
        store.rename(tmp_path / "away.db")

    def own(number, frame):
        raise AssertionError("nobody sends it")

    handlers = {signal.SIGTERM: signal.SIG_IGN, signal.SIGUSR1: signal.SIG_IGN, signal.SIGINT: own}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        threading.Thread(target=take_away, daemon=True).start()
        outcome = ray_peft.sweep(space, out=out, tracking_uri=f"sqlite:///{store}", console=Console())
        assert {number: signal.getsignal(number) for number in handlers} == handlers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    first, second = read_results(out)
    assert (first.status, first.untracked) == ("finished", None)
    assert second.status == "finished"
    assert second.untracked.startswith("no tracking store at")
    assert (outcome.finished, outcome.complete) == (True, False)
    assert outcome.unsent == (second.trial_id, "space")
    assert (out / "report.md").is_file()
    (tmp_path / "away.db").rename(store)  # it is back: the same call brings it what it lacks, and trains nothing
    outcome = ray_peft.sweep(space, out=out, tracking_uri=f"sqlite:///{store}", console=Console())
    assert outcome.complete
    assert [row.provenance.started_at for row in read_results(out)] == [
        row.provenance.started_at for row in (first, second)
    ]
    client = MlflowClient(f"sqlite:///{store}")
    for row in read_results(out):
        assert row.untracked is None
        run = client.get_run(row.mlflow_run_id)
        assert run.info.status == "FINISHED"
        assert run.data.metrics["scores.eval_loss"] == row.scores.eval_loss


def test_a_ray_that_we_start_listens_on_this_machine_alone():
    code = (
        "import ipaddress, os, psutil\n"
        "from ray_peft.schedule.cluster import connect\n"
        "with connect() as nodes:\n"
        "    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]\n"
        "    found = [c.laddr.ip for p in processes for c in p.net_connections('inet') if c.status == 'LISTEN']\n"
        "assert found and nodes\n"
        "print(sorted({ip for ip in found if not ipaddress.ip_address(ip.removeprefix('::ffff:')).is_loopback}))\n"
        "assert 'RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER' not in os.environ\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert (done.stdout.splitlines()[-1:], done.returncode) == (["[]"], 0), done.stderr
