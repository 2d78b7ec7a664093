"""`ray job submit` of a sweep on a local head, with token authentication on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import yaml

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def head(tmp_path):
    """Address of the jobs API of a Ray head of its own, and the environment that its clients need."""
    port, dashboard = free_port(), free_port()
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4, encoding="utf-8")
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_DISABLE_IMPORT_WARNING": "1",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [
        str(RAY), "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0", f"--port={port}",
        f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--include-dashboard=true",
        "--disable-usage-stats", "--ray-client-server-port=0", "--temp-dir=/tmp/ray_peft_jobs",
        "--node-ip-address=127.0.0.1",
    ]  # fmt: skip
    log = (tmp_path / "head.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            time.sleep(0.3)
        else:
            pytest.fail((tmp_path / "head.log").read_text())
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree("/tmp/ray_peft_jobs", ignore_errors=True)


def test_a_sweep_is_submitted_as_a_job(head, tiny_model, questions, tmp_path):
    address, environment = head
    work = tmp_path / "work"
    work.mkdir()
    for name in ("ray_peft", "jobs"):
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
    plain = tiny.plain_spec(tiny_model, questions, {"grid": [{"name": "none"}, {"name": "lora", "rank": 4}]})
    (work / "space.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    out = tmp_path / "out"
    settings = {"env_vars": {"RAY_PEFT_OUTPUTS": str(tmp_path / "outputs"), "HF_HUB_OFFLINE": "1"}}
    done = subprocess.run(
        [str(RAY), "job", "submit", "--address", address, "--working-dir", str(work),
         "--runtime-env-json", json.dumps(settings), "--",
         sys.executable, "jobs/sweep.py", "space.yaml", "--out", str(out)],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["finished", "finished"]
    assert "lora" in done.stdout
