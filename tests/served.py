"""A real MLflow server that tests kill and start again, and a connection to one that they cut."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path

from tracked import free_port, wait_for

from ray_peft.store.tracking import default_uri, ui_command, ui_environment


class Server:
    """Over a database, always on the same port."""

    def __init__(self, folder: Path, empty_database: Path | None = None, database_uri: str | None = None) -> None:
        """`folder` keeps its files, a copy of `empty_database` too, unless it is to use the database at a URI."""
        folder.mkdir()
        if empty_database is not None:
            shutil.copy(empty_database, folder / "mlflow.db")
        self._database_uri = database_uri
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        if self._database_uri is None:
            command = ui_command(default_uri(self.folder), self.folder / "artifacts", "127.0.0.1", self.port)
        else:
            command = [
                sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self._database_uri,
                "--artifacts-destination", (self.folder / "artifacts").as_uri(), "--serve-artifacts",
                "--workers", "1", "--host", "127.0.0.1", "--port", str(self.port),
            ]  # fmt: skip
        log = self.folder / "log.txt"
        with log.open("a") as output:
            self.process = subprocess.Popen(
                command, env=ui_environment(), cwd=self.folder, stdout=output, stderr=output, start_new_session=True
            )
        process = self.process

        def healthy() -> bool:
            assert process.poll() is None, log.read_text()
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
            return False

        wait_for(healthy, timeout_s=120)

    def kill(self) -> None:
        """End it and what it started, as kill -9 does; harmless if it is not there."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class Wire:
    """A TCP connection to a server that can be cut and mended."""

    def __init__(self, target: int) -> None:
        self.target, self.port = target, free_port()
        self.open: list[socket.socket] = []
        self.mend()

    def mend(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self.accept, args=(self.listener,), daemon=True).start()

    def cut(self) -> None:
        for one in [self.listener, *self.open]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self.open.clear()

    def accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                near, _ = listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:  # the server is away: so says the connection, and the next one is tried again
                    near.close()
                    continue
                self.open += [near, far]
                for source, sink in [(near, far), (far, near)]:
                    threading.Thread(target=self.pump, args=(source, sink), daemon=True).start()

    def pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
