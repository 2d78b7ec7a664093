"""The command that shows a local store in MLflow's own interface."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ray_peft.errors import TrackingError
from ray_peft.foundation.masking import mask
from ray_peft.store.tracking.store import is_server, sqlite_file


def ui_command(store_uri: str, artifact_root: Path | None, host: str, port: int) -> list[str]:
    """The command that serves MLflow's UI over a SQLite store; run it with `ui_environment()`.

    Raises:
        TrackingError: the store does not exist, or is a server, which has a UI of its own.
    """
    if is_server(store_uri):
        raise TrackingError(f"{mask(store_uri)} is an MLflow server: open that address in a browser")
    path = sqlite_file(store_uri)
    if not path.is_file():  # mlflow would create an empty one
        raise TrackingError(f"no tracking store at {path} yet; run a sweep first, or give another --tracking-uri")
    artifacts = artifact_root.expanduser().absolute() if artifact_root else path.parent / "mlartifacts"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{path}"]
    command += ["--artifacts-destination", artifacts.as_uri(), "--serve-artifacts", "--workers", "1"]
    return [*command, "--host", host, "--port", str(port)]


def ui_environment() -> dict[str, str]:
    """The whole environment for `ui_command`: this process's, without mlflow's job runner and telemetry."""
    return {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
