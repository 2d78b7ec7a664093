"""Eight writers at once on an MLflow server over PostgreSQL, as teams run one."""

from __future__ import annotations

import getpass
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Server
from tracked import free_port
from writers import write_at_once

_FOLDERS = [*map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), os.environ.get("PATH", "")]
PG_CTL = shutil.which("pg_ctl", path=os.pathsep.join(_FOLDERS))


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URI of a new PostgreSQL that listens on this machine alone."""
    assert PG_CTL is not None
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # the path of its socket must be short
    user = getpass.getuser()
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = next(name for name in ("postgres", "nobody") if name in {entry.pw_name for entry in pwd.getpwall()})
        shutil.chown(folder, user)
    port, data, log = free_port(), folder / "data", folder / "log.txt"

    def control(*arguments: str) -> None:
        done = subprocess.run(
            [PG_CTL, "-D", str(data), *arguments],
            user=user if os.geteuid() == 0 else None, cwd=folder, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")

    try:
        control("init", "-o", "--auth=trust --username=writer --encoding=UTF8 --no-sync")
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
        control("start", "-w", "-l", str(log), "-o", options)
        try:
            yield f"postgresql+psycopg://writer@127.0.0.1:{port}/postgres"
        finally:
            control("stop", "-m", "immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.skipif(PG_CTL is None, reason="PostgreSQL is not installed (no pg_ctl)")
@pytest.mark.skipif(importlib.util.find_spec("psycopg") is None, reason="needs psycopg: the extra `postgres`")
def test_eight_writers_lose_nothing_on_postgresql(postgres, tmp_path):
    server = Server(tmp_path / "served", database_uri=postgres)
    server.start()
    try:
        write_at_once(server.uri, tmp_path, writers=8, steps=6)
    finally:
        server.kill()
