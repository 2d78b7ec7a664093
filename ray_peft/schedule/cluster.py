"""The Ray cluster: starts a local one or joins an existing one; the only module that calls ray.init."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ray_peft.errors import PlacementError
from ray_peft.foundation.nvml import GpuMemory
from ray_peft.schedule import watch
from ray_peft.schedule.decide import Node
from ray_peft.schedule.environment import for_workers

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

logger = logging.getLogger(__name__)

GPU_LOOK_S = 20.0
"""Longest wait for what the GPUs of a cluster say of themselves."""

WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # forked tokenizers warn and may hang
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "BITSANDBYTES_NOWELCOME": "1",
}


@contextlib.contextmanager
def connect(address: str | None = None, *, verbose: bool = False) -> Iterator[list[Node]]:
    """Nodes of a Ray cluster, which is left at the end; a local one is stopped.

    Args:
        address: of a cluster to join; None takes RAY_ADDRESS, else a cluster that this process is already part of,
            else starts a local one without a dashboard, which listens on this machine alone.
        verbose: print the workers' output.

    Raises:
        PlacementError: the cluster cannot be reached.
    """
    import ray

    if ray.is_initialized():
        yield nodes_now()
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
        settings |= {"address": address, "runtime_env": for_workers(WORKER_ENVIRONMENT)}
    else:
        settings |= {
            "address": "local",  # else Ray would join a cluster that happens to run on this machine
            "include_dashboard": False,
            "_metrics_export_port": None,
            "object_store_memory": 256 * 2**20,  # specs and metrics only: rows and weights are read from disk
        }
    if not verbose:
        _quiet_raylets()
    try:
        alone = not address or _on_loopback_alone(address)
        with _own_sigterm(), _this_machine_alone() if alone else contextlib.nullcontext():
            ray.init(**settings)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        raise _out_of_reach(f"the Ray cluster at {address}" if address else "a local Ray", error) from None
    try:
        yield nodes_now()
    finally:
        watch.leave()


class Connection:
    """The cluster of one sweep: left at the end, and replaced if it is a local one that has died."""

    def __init__(self, address: str | None) -> None:
        """`address` is that of `connect`."""
        self._address = address
        self._context = contextlib.ExitStack()
        self.replaceable = False
        """True once this process has started a Ray of its own."""

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> list[Node]:
        """The nodes of the cluster.

        Raises:
            PlacementError: it cannot be reached.
        """
        import ray

        self.replaceable = not (ray.is_initialized() or self._address or os.environ.get("RAY_ADDRESS"))
        if self.replaceable:
            _outlive_head()
        return self._context.enter_context(connect(self._address))

    def close(self) -> None:
        """A sweep has ended."""
        self.leave()

    def leave(self) -> None:
        """Leave the cluster: none of the sweep's processes is left on it."""
        self._context.close()

    def replace(self) -> None:
        """Start another local Ray in place of one that has died.

        Raises:
            PlacementError: it does not start.
        """
        self._context.close()
        self._context.enter_context(connect(self._address))


class KeptConnection(Connection):
    """The cluster of several sweeps one after the other: a local Ray starts once, with the first that needs it."""

    def __init__(self, address: str | None) -> None:
        """`address` is that of `connect`."""
        super().__init__(address)
        self._connected = False

    def connect(self) -> list[Node]:
        """The nodes of the cluster, as they are now."""
        if self._connected:
            return nodes_now()
        nodes = super().connect()
        self._connected = True
        return nodes

    def close(self) -> None:
        """A sweep has ended; the next one goes on here."""

    def leave(self) -> None:
        """Leave the cluster after the last one, or where trials may still run; another one would start again."""
        self._connected = False
        super().leave()


def _outlive_head() -> None:
    """Let this process, not those that it starts, live on when its head dies: Ray ends it after 60 s otherwise."""
    name = "RAY_gcs_rpc_server_reconnect_timeout_s"
    if name in os.environ:
        return
    os.environ[name] = str(365 * 24 * 3600)
    try:
        from ray._raylet import Config  # type: ignore[attr-defined]

        Config.ray_cookie()  # Ray reads its settings once, when it first needs one
    finally:
        del os.environ[name]


def cores_here() -> int:
    """The CPU cores that a local Ray counts on this machine: in a container, those that it may use."""
    from ray._private.utils import get_num_cpus

    return int(get_num_cpus(override_docker_cpu_warning=True))


def on_all_cores(
    function: Callable[[ItemT], ResultT], items: Sequence[ItemT], failed: Callable[[ItemT, Exception], ResultT]
) -> list[ResultT]:
    """Apply `function` to all items in parallel on the cluster's cores; `failed` gives the result of a lost task."""
    import ray

    largest = max((node.cpus for node in nodes_now(measured=False)), default=1)

    @ray.remote(num_cpus=min(2, largest))  # two cores, since its libraries take a gigabyte of memory
    def task(item: ItemT) -> ResultT:  # Ray takes no bound methods
        return function(item)

    results = []
    for item, reference in [(item, task.remote(item)) for item in items]:
        try:
            results.append(ray.get(reference))
        except ray.exceptions.RayError as error:
            results.append(failed(item, error))
    return results


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


def _on_loopback_alone(address: str) -> bool:
    """True for a cluster that another process here started as `connect` does: Ray would look at the LAN's address."""
    import ray.util

    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host.strip("[]") not in ("127.0.0.1", "localhost", "::1") or not port.isdecimal():
        return False
    try:
        here: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        socket.create_connection((here, int(port)), timeout=5).close()
    except (OSError, OverflowError):
        return True
    return False


def _quiet_raylets() -> None:
    """Keep off the console what Ray 2.60 prints of a dead node in spite of `log_to_driver`: 30 lines of its log.

    What it means for a trial stands in the sweep's own line and in the trial's row.
    """
    from ray._private import worker

    shown = worker.print_to_stdstream
    if getattr(shown, "quiet", False):
        return

    def quiet(data: dict[str, Any], ignore_prefix: bool) -> None:
        if data.get("pid") != "raylet":
            shown(data, ignore_prefix)

    quiet.quiet = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = quiet


def _out_of_reach(where: str, error: Exception) -> PlacementError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return PlacementError(
        f"{where} cannot be reached: {reason}; check --address and RAY_ADDRESS, or leave both out to start a local one"
    )


@contextlib.contextmanager
def _this_machine_alone() -> Iterator[None]:
    """Let a local Ray and its processes listen on the loopback address.

    Ray 2.60 takes the address in the local network, also in place of `_node_ip_address="127.0.0.1"`, except where it
    does not support clusters: on Windows and macOS, unless this variable says otherwise.
    """
    from ray._private import ray_constants

    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    if name in os.environ:  # the user's choice
        yield
        return
    os.environ[name] = "0"  # for the processes that Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this one, where it was read when Ray was imported
    try:
        yield
    finally:
        del os.environ[name]
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the caller's answer to SIGTERM: ray.init puts its own in its place, which ends the process at once."""
    own = signal.getsignal(signal.SIGTERM)
    # Where nothing is set, Ray's answer ends its processes, too; signals.py takes it away with the cluster.
    if own in (None, signal.SIG_DFL) or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None  # SIGTERM while Ray was starting
    finally:
        signal.signal(signal.SIGTERM, own)


def nodes_now(*, measured: bool = True) -> list[Node]:
    """The nodes that run trials.

    Args:
        measured: ask their GPUs what they are and what is free, which takes a moment.
    """
    alive = alive_nodes()
    gpus = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in alive}
    memory = _gpu_memory(gpus) if measured else {}
    return [
        Node(
            cpus=int(node["Resources"].get("CPU", 0)),
            gpus=gpus[node["NodeID"]],
            gpu_name=min(gpu_memory, key=lambda gpu: gpu.free_gib).name if gpu_memory else None,
            gpu_memory_gib=min(gpu.free_gib for gpu in gpu_memory) if gpu_memory else None,
            accelerator=next((kind for kind in node["Resources"] if kind.startswith("accelerator_type:")), None),
        )
        for node in alive
        for gpu_memory in [memory.get(node["NodeID"], [])]
    ]


def _gpu_memory(gpus: dict[str, int]) -> dict[str, list[GpuMemory]]:
    """What NVML says of the GPUs that are free on each node, by node id: a task holds one GPU while it looks.

    Args:
        gpus: how many each node has.
    """
    import ray

    def look() -> GpuMemory | None:
        from ray_peft.foundation.nvml import gpu_memory

        visible = [str(gpu_id) for gpu_id in ray.get_gpu_ids()]
        first = gpu_memory(visible[0]) if visible else None
        if first is None or first.free_gib > 0.9 * first.total_gib:
            return first
        time.sleep(1.0)  # a process that has ended may still hold some
        again = gpu_memory(visible[0])
        return max(first, again, key=lambda gpu: gpu.free_gib) if again is not None else first

    by_node: dict[str, list[GpuMemory]] = {}
    nodes = [node for node, count in gpus.items() for _ in range(count)]
    # More than half of a GPU, so that no two look at the same; somebody else may hold one, which is late then.
    for node, memory in answers_of(nodes, look, within_s=GPU_LOOK_S, num_gpus=0.51):
        if memory is not None:
            by_node.setdefault(node, []).append(memory)
    return by_node


def alive_nodes() -> list[dict[str, Any]]:
    """What Ray says of the nodes that run trials."""
    import ray

    return [
        node
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    ]


def answers_of(
    nodes: Sequence[str], ask: Callable[[], ResultT], *, within_s: float, num_gpus: float = 0
) -> list[tuple[str, ResultT]]:
    """What `ask` returns on each node, with the node's id; nothing of one that fails there or is late.

    Args:
        nodes: ids; one that stands here twice is asked twice.
        ask: runs in a process of that node.
        within_s: seconds to wait for all of them.
        num_gpus: that it holds while it runs.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=0, num_gpus=num_gpus, max_retries=0)
    def task() -> ResultT:  # Ray takes functions alone
        return ask()

    node_of = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): node
        for node in nodes
    }
    if not node_of:
        return []
    ready, late = ray.wait(list(node_of), num_returns=len(node_of), timeout=within_s)
    for reference in late:
        ray.cancel(reference, force=True)
    answers = []
    for reference in ready:
        with contextlib.suppress(ray.exceptions.RayError):
            answers.append((node_of[reference], ray.get(reference)))
    return answers
