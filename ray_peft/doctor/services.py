"""Probes of what trials need beside the processor: Ray, MLflow, a folder, a console and the hub."""

from __future__ import annotations

import base64
import contextlib
import http.client
import importlib.metadata
import os
import shutil
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from ray_peft.doctor.findings import Finding, Level, Probe
from ray_peft.foundation.units import GIB

T = TypeVar("T")

NETWORK_TIMEOUT_S = 3.0
OFFLINE_FLAGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")


def _ray() -> list[Finding]:
    version = importlib.metadata.version("ray")
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        return [Finding("Ray", f"{version}, starts on this machine (no RAY_ADDRESS)")]
    if address == "auto":
        return [Finding("Ray", f"{version}, joins the cluster on this machine (RAY_ADDRESS=auto)")]
    value = f"{version}, RAY_ADDRESS={address}"
    parts = urlsplit(address if "://" in address else f"gcs://{address}")
    advice = "Start the cluster, or unset RAY_ADDRESS to run on this machine."
    try:
        port = parts.port or {"http": 8265, "https": 443, "ray": 10001}.get(parts.scheme, 6379)
        _within(NETWORK_TIMEOUT_S, lambda: socket.create_connection((parts.hostname, port), NETWORK_TIMEOUT_S).close())
    except (OSError, ValueError) as error:
        return [Finding("Ray", f"{value}: not reachable ({_reason(error)})", "problem", advice)]
    if parts.scheme in ("http", "https"):
        return [Finding("Ray", f"{value}: reachable", "note", "An http address serves `ray job submit` only.")]
    return [Finding("Ray", f"{value}: reachable")]


def _ray_token() -> list[Finding]:
    name, mode = "Ray authentication", os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        advice = "Whoever reaches Ray's ports can run programs here: unset RAY_AUTH_MODE outside of a closed machine."
        return [Finding(name, "disabled by RAY_AUTH_MODE", "note", advice)]
    stated = f"RAY_AUTH_MODE={mode}" if mode else "RAY_AUTH_MODE not set"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return [Finding(name, f"{stated}, token in RAY_AUTH_TOKEN")]
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.is_file():
        if os.environ.get("RAY_ADDRESS", "") not in ("", "local"):
            return [Finding(name, f"{stated}, no token in {path}", "problem", "Copy the cluster's token to that file.")]
        return [Finding(name, f"{stated}, no token yet; Ray makes one when it starts here")]
    if os.name == "posix" and path.stat().st_mode & 0o077:
        return [Finding(name, f"{stated}, token in {path}", "note", f"Others can read it: chmod 600 {path}")]
    return [Finding(name, f"{stated}, token in {path}")]


def _mlflow() -> list[Finding]:
    version = importlib.metadata.version("mlflow")
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        return [Finding("MLflow", f"{version}, no MLFLOW_TRACKING_URI")]
    if urlsplit(uri).scheme not in ("http", "https"):
        return [Finding("MLflow", f"{version}, {uri}: not a server, so not contacted")]
    try:
        status = _within(NETWORK_TIMEOUT_S, lambda: _health_status(uri))
    except (OSError, ValueError, http.client.HTTPException) as error:
        advice = "Start the server (mlflow server), or correct or unset MLFLOW_TRACKING_URI."
        return [Finding("MLflow", f"{version}, {uri}: not reachable ({_reason(error)})", "problem", advice)]
    value = f"{version}, {uri}: reachable"
    if status in (401, 403):
        advice = "It asks for a login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."
        return [Finding("MLflow", value, "note", advice)]
    if status != 200:
        return [Finding("MLflow", f"{value}, but /health answers {status}", "note", "Is it an MLflow server?")]
    return [Finding("MLflow", value)]


def _health_status(uri: str) -> int:
    """The HTTP status of the tracking server's /health."""
    parts = urlsplit(uri)
    address = parts.netloc.rpartition("@")[2]
    request = urllib.request.Request(urlunsplit((parts.scheme, address, parts.path.rstrip("/") + "/health", "", "")))
    if parts.username:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(login.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT_S) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def _disk() -> list[Finding]:
    folder = Path(os.environ.get("RAY_PEFT_OUTPUTS") or "outputs").absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free_gib = shutil.disk_usage(existing).free / GIB
    value = f"{folder}, {free_gib:.1f} GiB free"
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return [Finding("output folder", f"{value}, not writable", "problem", "Choose another one: RAY_PEFT_OUTPUTS.")]
    if free_gib < 10:
        level: Level = "problem" if free_gib < 1 else "note"
        return [Finding("output folder", value, level, "Checkpoints need room: set RAY_PEFT_OUTPUTS to a larger disk.")]
    return [Finding("output folder", value)]


def _console() -> list[Finding]:
    encoding = getattr(sys.stdout, "encoding", None) or "unknown"
    advice = "Set PYTHONIOENCODING=utf-8: text that a model writes may otherwise be shown escaped, or fail."
    try:
        "ABCxyz 0189 ~{|} \u00e9 \u2192 \u4e2d \U0001f600".encode(encoding)
    except UnicodeEncodeError:
        return [Finding("console", f"{encoding}, prints our tables but not every language", "note", advice)]
    except LookupError:
        return [Finding("console", encoding, "note", advice)]
    return [Finding("console", f"{encoding}, prints every language")]


def _hub() -> list[Finding]:
    """Whether the hub answers; not asked where a flag forbids it."""
    name = "Hugging Face hub"
    flags = [f"{flag}={os.environ[flag]}" for flag in OFFLINE_FLAGS if os.environ.get(flag)]
    flag_list = "".join(f", {flag}" for flag in flags)
    advice = "Models and data sets must be local folders, or in the cache already."
    if any(flag.partition("=")[2].upper() in ("1", "TRUE", "YES", "ON") for flag in flags):
        return [Finding(name, f"offline{flag_list}", "note", advice)]
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        _within(NETWORK_TIMEOUT_S, lambda: _answers(address))
    except (OSError, ValueError, http.client.HTTPException) as error:
        return [Finding(name, f"{address}: not reachable ({_reason(error)}){flag_list}", "note", advice)]
    return [Finding(name, f"{address}: reachable{flag_list}")]


def _answers(address: str) -> None:
    """Ask a web server for anything; an error that it answers with is an answer, too."""
    request = urllib.request.Request(address, method="HEAD")
    with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT_S):
        pass


def _within(seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`, or TimeoutError.

    Socket timeouts bound neither name resolution nor a server that answers byte by byte, so the caller stops waiting.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:  # Raised again below, in the caller's thread.
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} s") from None


def _reason(error: Exception) -> str:
    """Why a server was not reached; a malformed address is not quoted, since its parts may be a password's."""
    if isinstance(error, (ValueError, http.client.HTTPException)):
        return f"malformed address or answer, {type(error).__name__}"
    return str(getattr(error, "reason", None) or error)


PROBES: tuple[tuple[str, Probe], ...] = (
    ("Ray", _ray),
    ("Ray authentication", _ray_token),
    ("MLflow", _mlflow),
    ("output folder", _disk),
    ("console", _console),
    ("Hugging Face hub", _hub),
)
