"""The server of the live page: on this machine alone, and for those who know its address alone."""

from __future__ import annotations

import json
import secrets
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ray_peft.foundation.measured import to_json
from ray_peft.live.page import PAGE, POLICY
from ray_peft.live.state import State

HOST = "127.0.0.1"


class LiveServer(ThreadingHTTPServer):
    """Serves one sweep's page under an address with a random part: others on this machine have no rights to it."""

    daemon_threads = True

    def __init__(self, sweep: Path, port: int) -> None:
        """Listen.

        Args:
            sweep: its folder.
            port: 0 takes a free one.

        Raises:
            DataError: the folder holds no sweep.
            OSError: nothing can listen there.
        """
        self._state, self._reading = State(sweep), threading.Lock()
        self.key = secrets.token_urlsafe(12)
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        """The page's."""
        return f"http://{HOST}:{self.server_address[1]}/{self.key}/"

    def answer(self, path: str) -> tuple[str, bytes] | None:
        """The content of a path with its type; None if there is none."""
        if path == f"/{self.key}/":
            return "text/html; charset=utf-8", PAGE.encode()
        if path == f"/{self.key}/state.json":
            with self._reading:
                return "application/json", json.dumps(to_json(self._state.plain())).encode()
        return None


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer

    def do_GET(self) -> None:
        """Answer a browser."""
        answer = self.server.answer(self.path)
        if answer is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        kind, content = answer
        self.send_response(HTTPStatus.OK)
        headers = {
            "Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store",
            "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Every look of the page would be a line."""
