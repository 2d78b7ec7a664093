"""Processes that we started: how they end with all that they started themselves."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

PATIENCE_S = 5.0


def end_group(leader: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session of its own, and all that it started.

    On Windows, which has no process groups of this kind, those are the leader's descendants that can still be found.
    """
    if not hasattr(os, "killpg"):
        _end_tree(leader)
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            leader.wait(timeout=PATIENCE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)


def end_now(code: int) -> None:
    """End this process with an exit code and all that it started, without another step: files are whole or absent."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(code)


def _end_tree(leader: subprocess.Popen[bytes]) -> None:
    import psutil

    try:
        root = psutil.Process(leader.pid)
        family = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
