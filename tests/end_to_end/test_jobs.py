"""`ray job submit` of a sweep on a local head, with token authentication on."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import tiny
import yaml
from tracked import free_port, wait_for

ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def http_status(url: str) -> int | None:
    """The answer's status; null where nothing answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.fixture
def head(tmp_path):
    """Address of the jobs API of a Ray head of its own, and the environment that its clients need."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    dashboard, agent = free_port(), free_port()
    session = tempfile.mkdtemp(prefix="rp", dir="/tmp")  # Ray's sockets lie below it, and their paths must be short
    command = [
        RAY, "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0", "--node-ip-address=127.0.0.1",
        f"--port={free_port()}", f"--ray-client-server-port={free_port()}", "--include-dashboard=true",
        f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--disable-usage-stats",
        f"--dashboard-agent-listen-port={agent}", f"--object-store-memory={256 * 2**20}",
        f"--temp-dir={session}",
    ]  # fmt: skip
    address, log = f"http://127.0.0.1:{dashboard}", tmp_path / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        # The dashboard refuses jobs until its agent, which starts last, is there.
        for url in (f"{address}/api/version", f"http://127.0.0.1:{agent}/api/local_raylet_healthz"):
            wait_for(lambda url=url: process.poll() is not None or http_status(url) is not None, 90)
        assert process.poll() is None, log.read_text()
        yield address, environment
    finally:
        # Never `ray stop`: it ends every Ray on the machine.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(session, ignore_errors=True)


def test_a_sweep_is_submitted_as_a_job(head, tiny_model, questions, tmp_path):
    address, environment = head
    assert http_status(f"{address}/api/jobs/") == 401  # without the token
    work = tmp_path / "work"
    for name in ("ray_peft", "jobs"):
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
    plain = tiny.plain_spec(tiny_model, questions, {"grid": [{"name": "none"}, {"name": "lora", "rank": 4}]})
    (work / "space.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    out = tmp_path / "out"
    settings = {"env_vars": {"RAY_PEFT_OUTPUTS": str(tmp_path / "outputs"), "HF_HUB_OFFLINE": "1"}}
    done = subprocess.run(
        [RAY, "job", "submit", "--address", address, "--working-dir", str(work),
         "--runtime-env-json", json.dumps(settings), "--",
         sys.executable, "jobs/sweep.py", "space.yaml", "--out", str(out)],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[2/2]" in done.stdout
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["finished", "finished"]
    assert {row["spec"]["method"]["name"] for row in rows} == {"none", "lora"}
