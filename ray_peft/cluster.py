"""The Ray cluster: starts a local one or joins an existing one; the only module that calls ray.init."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

from ray_peft.errors import PlacementError
from ray_peft.placement import Node

logger = logging.getLogger(__name__)

WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # forked tokenizers warn and may hang
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "BITSANDBYTES_NOWELCOME": "1",
}


@contextlib.contextmanager
def connect(address: str | None = None, *, verbose: bool = False) -> Iterator[list[Node]]:
    """Nodes of a Ray cluster, which is left at the end; a local one is stopped.

    Args:
        address: of a cluster to join; null takes RAY_ADDRESS, else a cluster that this process is already part of,
            else starts a local one, whose dashboard listens on this machine alone.
        verbose: print the workers' output.

    Raises:
        PlacementError: the cluster cannot be reached.
    """
    import ray

    if ray.is_initialized():
        yield _nodes()
        return
    # Set before ray is started, so that workers inherit it.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # polls every 5 s, also on the way out
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = address or os.environ.get("RAY_ADDRESS")
    settings: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.ERROR}
    if address:
        _check_address(address)
        settings |= {"address": address, "runtime_env": {"env_vars": dict(WORKER_ENVIRONMENT)}}
    else:
        settings |= {
            "include_dashboard": False,
            "_metrics_export_port": None,
            "object_store_memory": 256 * 2**20,  # specs and metrics only: rows and weights are read from disk
        }
    try:
        with _own_sigterm():
            ray.init(**settings)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        raise _out_of_reach(f"the Ray cluster at {address}" if address else "a local Ray", error) from None
    try:
        yield _nodes()
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Ray itself tries for minutes to reach an address where nothing listens.

    Raises:
        PlacementError: nothing listens there.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():  # "auto" and the like
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise _out_of_reach(f"the Ray cluster at {address}", error) from None


def _out_of_reach(where: str, error: Exception) -> PlacementError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return PlacementError(
        f"{where} cannot be reached: {reason}; check --address and RAY_ADDRESS, or leave both out to start a local one"
    )


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the caller's answer to SIGTERM: ray.init puts its own in its place, which ends the process at once."""
    own = signal.getsignal(signal.SIGTERM)
    if not callable(own) or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None  # SIGTERM while Ray was starting
    finally:
        signal.signal(signal.SIGTERM, own)


def _nodes() -> list[Node]:
    import ray

    return [
        Node(cpus=int(node["Resources"].get("CPU", 0)), gpus=int(node["Resources"].get("GPU", 0)))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    ]
