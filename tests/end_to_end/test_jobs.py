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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A Ray head of its own: the address of its jobs API, that of Ray itself, and what its clients need to know."""
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text(secrets.token_hex(32), encoding="utf-8")
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    dashboard, agent, port = free_port(), free_port(), free_port()
    session = tempfile.mkdtemp(prefix="rp", dir="/tmp")  # Ray's sockets lie below it, and their paths must be short
    command = [
        RAY, "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0", "--node-ip-address=127.0.0.1",
        f"--port={port}", f"--ray-client-server-port={free_port()}", "--include-dashboard=true",
        f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--disable-usage-stats",
        f"--dashboard-agent-listen-port={agent}", f"--object-store-memory={256 * 2**20}",
        f"--temp-dir={session}",
    ]  # fmt: skip
    address, log = f"http://127.0.0.1:{dashboard}", folder / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        # The dashboard refuses jobs until its agent, which starts last, is there.
        for url in (f"{address}/api/version", f"http://127.0.0.1:{agent}/api/local_raylet_healthz"):
            wait_for(lambda url=url: process.poll() is not None or http_status(url) is not None, 90)
        assert process.poll() is None, log.read_text()
        yield Head(address, f"127.0.0.1:{port}", environment)
    finally:
        # Never `ray stop`: it ends every Ray on the machine.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(session, ignore_errors=True)


@dataclass(frozen=True)
class Head:
    """A Ray head."""

    address: str
    gcs: str
    environment: dict[str, str]

    def python(self, code: str, *arguments: str, folder: Path, **variables: str) -> str:
        """What a Python program prints that is a client of the head."""
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**self.environment, **variables}, cwd=folder, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def commands(self, *commands: list[str], folder: Path, **variables: str) -> list[tuple[int, str]]:
        """Exit code and output of commands of ray-peft, in one process, since imports take seconds."""
        out = self.python(COMMANDS, json.dumps(commands), self.address, folder=folder, **variables)
        return [(code, text) for code, text in json.loads(out.splitlines()[-1])]


COMMANDS = """
import contextlib, io, json, pathlib, re, sys, time
from ray_peft import cli
answers = []
for command in json.loads(sys.argv[1]):
    if command[0] == "wait":
        until = time.monotonic() + 120
        while not [*pathlib.Path().glob(command[1])]:
            assert time.monotonic() < until, answers
            time.sleep(0.1)
        continue
    match = re.search(r"([\\w-]+): \\d+ trials", answers[0][1]) if answers else None
    job = match[1] if match else ""
    command = [job if word == "JOB" else word for word in command]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        address = [] if {"--address", "watch"} & {*command} else ["--address", sys.argv[2]]
        code = cli.main([*command, *address])
    answers.append((code, output.getvalue()))
print(json.dumps(answers))
"""
"""JOB stands for the id of the job that the first command has submitted."""
PYTHON = ["--python", sys.executable]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_sweep_is_submitted_as_a_job_of_ray(head, tiny_model, questions, tmp_path):
    assert http_status(f"{head.address}/api/jobs/") == 401  # without the token
    work = tmp_path / "work"
    for name in ("ray_peft", "jobs"):
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
    plain = tiny.plain_spec(tiny_model, questions, {"name": "none"})
    (work / "space.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    out = tmp_path / "out"
    settings = {"env_vars": {"RAY_PEFT_OUTPUTS": str(tmp_path / "outputs"), "HF_HUB_OFFLINE": "1"}}
    done = subprocess.run(
        [RAY, "job", "submit", "--address", head.address, "--working-dir", str(work),
         "--runtime-env-json", json.dumps(settings), "--",
         sys.executable, "jobs/sweep.py", "space.yaml", "--out", str(out)],
        env=head.environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[1/1]" in done.stdout
    assert [row["status"] for row in rows_of(out)] == ["finished"]


def test_submit_follow_list_and_fetch(head, tiny_model, questions, tmp_path):
    # A model and rows that only the submitting machine has.
    work = tmp_path / "work"
    shutil.copytree(tiny_model, work / "model")
    shutil.copyfile(questions, work / "rows.jsonl")
    plain = tiny.plain_spec("./model", "rows.jsonl", {"grid": [{"name": "none"}, {"name": "lora", "rank": 4}]})
    (work / "space.yaml").write_text(yaml.safe_dump({"name": "sent", **plain}), encoding="utf-8")
    variables = {"RAY_PEFT_OUTPUTS": str(tmp_path / "outputs"), "HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_" + "x" * 30}
    submitted, listed, fetched, *unknown = head.commands(
        ["submit", "space.yaml", "--follow", *PYTHON],
        ["jobs", "--json"],
        ["fetch", "JOB", "--to", "copy", *PYTHON],
        ["fetch", "sent-no-such-job", *PYTHON],
        ["stop", "sent-no-such-job"],
        folder=work, **variables,
    )  # fmt: skip
    assert submitted[0] == 0, submitted[1]
    assert "[2/2]" in submitted[1]
    assert "sent along: model, rows.jsonl" in submitted[1]
    assert variables["HF_TOKEN"] not in submitted[1]
    (job,) = [job for job in json.loads(listed[1]) if job["name"] == "sent"]
    assert job["state"] == "SUCCEEDED"
    out = tmp_path / "outputs" / "sent"
    assert job["out"] == str(out)
    assert fetched[0] == 0, fetched[1]
    assert rows_of(work / "copy") == rows_of(out)
    assert [row["status"] for row in rows_of(out)] == ["finished", "finished"]
    assert (work / "copy" / "report.html").read_bytes() == (out / "report.html").read_bytes()
    assert not (work / "copy" / "trials").exists()
    for code, text in unknown:
        assert code == 2
        assert text.count("\n") == 1
        assert "knows no job sent-no-such-job" in text


def test_stop_ends_trials_as_an_interrupt_does(head, tiny_model, questions, tmp_path):
    plain = tiny.plain_spec(tiny_model, questions, train__steps=100_000)
    (tmp_path / "long.yaml").write_text(yaml.safe_dump({"name": "long", **plain}), encoding="utf-8")
    out = tmp_path / "out"
    submitted, watched, stopped, listed = head.commands(
        ["submit", "long.yaml", "--out", str(out), *PYTHON],
        ["wait", "out/trials/*/live.json"],
        ["wait", "out/trials/*/metrics.jsonl"],
        ["watch", str(out), "--once", "--json"],
        ["stop", "JOB"],
        ["jobs"],
        folder=tmp_path, RAY_PEFT_OUTPUTS=str(tmp_path / "outputs"),
    )  # fmt: skip
    assert submitted[0] == stopped[0] == 0, submitted[1] + stopped[1]
    assert "STOPPED" in listed[1]
    (running,) = json.loads(watched[1])["trials"]
    assert running["state"] in ("load", "train")
    (row,) = rows_of(out)
    assert row["status"] == "cancelled"
    assert row["trial_id"] == running["trial_id"]
    assert [*(out / "trials" / row["trial_id"]).glob("stage*/checkpoint-*")]
    assert (out / "report.html").is_file()


JOINED = """
import json, os, sys, urllib.request
import ray
from ray_peft.schedule import cluster

@ray.remote
def variables(names):
    import os
    return {name: os.environ.get(name) for name in names}

with cluster.connect(sys.argv[1]):
    token = open(os.environ["RAY_AUTH_TOKEN_PATH"]).read()
    question = urllib.request.Request(f"{sys.argv[2]}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    print(json.dumps([ray.get(variables.remote(sys.argv[3:])), urllib.request.urlopen(question).read().decode()]))
"""


def test_a_drivers_variables_reach_its_workers_and_secrets_are_not_listed(head, tmp_path):
    own = {"RAY_PEFT_MODEL": "/models/small", "HF_TOKEN": "hf_" + "x" * 30, "MLFLOW_TRACKING_PASSWORD": "correct horse"}
    seen, listed = json.loads(
        head.python(JOINED, head.gcs, head.address, *own, folder=tmp_path, **own).splitlines()[-1]
    )
    assert seen == own
    assert own["RAY_PEFT_MODEL"] in listed
    assert own["HF_TOKEN"] not in listed
    assert own["MLFLOW_TRACKING_PASSWORD"] not in listed


def test_a_wrong_token_and_a_wrong_address_are_one_clear_error(head, tmp_path):
    wrong = tmp_path / "wrong"
    wrong.write_text(secrets.token_hex(32), encoding="utf-8")
    answers = head.commands(
        ["jobs"], ["jobs", "--address", "http://127.0.0.1:9"], ["jobs", "--address", head.gcs],
        folder=tmp_path, RAY_AUTH_TOKEN_PATH=str(wrong),
    )  # fmt: skip
    assert [code for code, _ in answers] == [2, 2, 2]
    assert [text.count("\n") for _, text in answers] == [1, 1, 1]
    assert "does not take this token" in answers[0][1]
    assert all("no Ray dashboard answers at" in text for _, text in answers[1:])
