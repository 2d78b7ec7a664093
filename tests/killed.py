"""A sweep as a process of its own, that tests kill parts of: what is running, what it left, and how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml
from tracked import wait_for

ROOT = Path(__file__).resolve().parents[1]


def write_space(path: Path, plain: dict[str, Any]) -> Path:
    """A search space file from the plain form of a trial, whose method may be a grid."""
    path.write_text(yaml.safe_dump({"name": path.stem, **plain}), encoding="utf-8")
    return path


class Sweep:
    """`ray-peft sweep SPACE` in a session of its own."""

    def __init__(self, space: Path, out: Path, store: str, *more: str) -> None:
        command = [sys.executable, "-m", "ray_peft", "sweep", str(space), "--out", str(out), "--tracking-uri", store]
        self.out, self.log = out, out.with_name(f"{out.name}.log")
        self.family: dict[int, psutil.Process] = {}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*command, *more], env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def look(self) -> list[psutil.Process]:
        """Its processes, which are remembered."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self.family.setdefault(process.pid, process)
        return list(self.family.values())

    def until(self, condition: Callable[[], bool], timeout_s: float = 240) -> None:
        """Wait for something that happens while it runs."""

        def happened() -> bool:
            self.look()
            assert self.process.poll() is None or condition(), self.output
            return condition()

        wait_for(happened, timeout_s)

    def steps(self, method: str) -> int:
        """Training steps that a trial of this method has logged."""
        logs = self.out.glob(f"trials/{method}-*/metrics.jsonl")
        return sum(line.count('"train_loss"') for log in logs for line in log.read_text().splitlines())

    def kill(self, name: str) -> None:
        """kill -9 of the processes of which the name starts so."""
        victims = [process for process in self.look() if _name(process).startswith(name)]
        assert victims, [_name(process) for process in self.look()]
        for process in victims:
            process.kill()

    def kill_worker(self, method: str) -> None:
        """kill -9 of the process that writes the log of a trial of this method."""
        (log,) = self.out.glob(f"trials/{method}-*/log.txt")
        for process in self.look():
            with contextlib.suppress(psutil.Error):
                if str(log) in {file.path for file in process.open_files()}:
                    process.kill()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 240) -> int:
        """Its exit code."""
        until = time.monotonic() + timeout_s
        while self.process.poll() is None:
            self.look()
            assert time.monotonic() < until, self.output
            time.sleep(0.1)
        return self.process.returncode

    def left(self, patience_s: float = 15) -> list[str]:
        """Names of processes that are still there some seconds after its end."""
        _, alive = psutil.wait_procs(self.family.values(), timeout=patience_s)
        return [_name(process) for process in alive if _name(process)]

    def end(self) -> None:
        """End what is left of it, whatever happened."""
        for process in self.look():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def rows(self) -> dict[str, dict[str, Any]]:
        """The last row of every trial, by the name of its method."""
        path = self.out / "results.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return {row["spec"]["method"]["name"]: row for row in rows}


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "" if process.status() == psutil.STATUS_ZOMBIE else process.name()
    return ""
