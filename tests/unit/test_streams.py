"""Output that ends, is closed or does not fit: no traceback, an exit code that says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import yaml

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "ray_peft"]


@pytest.fixture(scope="module")
def space(tiny_model, questions, tmp_path_factory):
    """A space with so many trials that its plan does not fit a pipe's buffer."""
    rates = [1e-3 + number * 1e-6 for number in range(900)]
    plain = tiny.plain_spec(tiny_model, questions, {"name": "lora", "lr": {"grid": rates}})
    path = tmp_path_factory.mktemp("streams") / "space.yaml"
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return path


def shell(command: str, space: Path) -> subprocess.CompletedProcess:
    command = command.replace("CLI", " ".join(CLI)).replace("SPACE", str(space))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=space.parent, env=environment)


def test_a_reader_that_leaves_is_no_error(space):
    done = shell("CLI plan SPACE --json | head -n 2; echo ${PIPESTATUS[0]}", space)
    assert done.stdout.splitlines()[0] == "["
    assert done.stdout.splitlines()[-1] == "141"
    assert done.stderr == ""


def test_closed_streams_are_no_error(space):
    assert shell("CLI plan SPACE >&-", space).returncode == 0
    assert shell("CLI plan SPACE >&- 2>&-", space).returncode == 0
    done = shell("CLI plan gone.yaml >&-", space)
    assert (done.returncode, done.stderr) == (2, "error: gone.yaml: no such file\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_does_not_fit_is_one_error(space):
    done = shell("CLI plan SPACE > /dev/full", space)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write to standard output: No space left on device")
    assert len(done.stderr.splitlines()) == 1


def test_ctrl_c_while_a_plan_is_made_is_no_traceback(space):
    for wait_s in (0.5, 1.5):
        process = subprocess.Popen(
            [*CLI, "plan", str(space), "--gpu-memory-gib", "12"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, cwd=space.parent, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        time.sleep(wait_s)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
        assert (process.returncode, told) == (130, "interrupted\n")
