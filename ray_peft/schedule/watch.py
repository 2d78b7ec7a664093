"""Whether the Ray cluster is still alive: Ray itself waits for ever for the answer of a dead one."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from ray_peft.errors import ClusterLost

POLL_S = 0.2
SILENT_S = 20.0
"""How long a head may not answer; one that restarts with its state in Redis needs part of this time."""
STOP_S = 10.0
"""How long a call that was told to stop is waited for, and so is Ray's own way to leave a cluster that is lost."""
DEATH_S = 1.0
"""How long after its workers a local Ray may be seen to be dead."""
_VITAL = ("gcs_server", "raylet")
"""Ray's processes without which it does nothing, by its own names; a raylet ends by itself when its agent dies."""


class Watch:
    """Looks at the cluster that this process is connected to, until it is closed."""

    def __init__(self) -> None:
        import ray

        self._closed = threading.Event()
        self._answered = self._looked = time.monotonic()
        self._dead_here = False
        self._own_node = ray.get_runtime_context().get_node_id()
        # A thread, since the question itself waits for ever once nobody is there to answer.
        threading.Thread(target=self._ask_often, name="watch", daemon=True).start()

    def close(self) -> None:
        """Look no more."""
        self._closed.set()

    def lost(self) -> str | None:
        """Why the cluster is lost; None while it is there."""
        if (process := _dead_process()) is not None:
            return f"its {process} was killed or crashed"
        if self._dead_here:
            return "its node on this machine is dead (its raylet was killed, or crashed)"
        now = time.monotonic()
        if now - self._looked > SILENT_S / 2:  # this process itself stood still, as after Ctrl-Z
            self._answered = now
        self._looked = now
        if now - self._answered > SILENT_S:
            return f"its head has not answered for {SILENT_S:.0f} s"
        return None

    def _ask_often(self) -> None:
        import ray

        while not self._closed.wait(1.0):
            with contextlib.suppress(Exception):  # of a cluster that this process has left
                nodes = ray.nodes()  # type: ignore[no-untyped-call]
                self._answered = time.monotonic()
                self._dead_here = any(node["NodeID"] == self._own_node and not node["Alive"] for node in nodes)


def waited(call: Callable[[], object], stop: Callable[[], None] | None = None) -> bool:
    """Wait for a call that Ray may never end; false if the user interrupted it.

    Args:
        call: runs in a thread of its own, so that this one can be interrupted. What it raises is raised here.
        stop: makes `call` come back soon; None leaves it behind.

    Raises:
        ClusterLost: the cluster died meanwhile.
        KeyboardInterrupt: the user interrupted a second time.
    """
    from ray._private import auto_init_hook

    # A call that is left behind would start another Ray as soon as this one is gone.
    auto_init_hook.enable_auto_connect = False
    raised: list[BaseException] = []

    # Not the thread's own end: CPython 3.11 takes a thread for ended once its join was interrupted.
    ended = threading.Event()

    def body() -> None:
        try:
            call()
        except BaseException as error:  # raised in the caller's thread
            raised.append(error)
        finally:
            ended.set()

    watch = Watch()
    threading.Thread(target=body, name="waited", daemon=True).start()
    try:
        while not ended.wait(POLL_S):
            if (why := watch.lost()) is not None:
                raise ClusterLost(why)
    except KeyboardInterrupt:
        if stop is not None:
            stop()
            ended.wait(STOP_S)
        return False
    except ClusterLost:
        if stop is not None:
            stop()
        raise
    finally:
        watch.close()
    if raised:
        why = watch.lost()
        raise raised[0] if why is None else ClusterLost(why)
    return True


def dies() -> bool:
    """True if a local Ray has just died: the deaths of its workers are told first, and are not their own then."""
    until = time.monotonic() + DEATH_S
    while _own_node() is not None and time.monotonic() < until:
        if _dead_process() is not None:
            return True
        time.sleep(POLL_S)
    return False


def leave() -> None:
    """Disconnect from the cluster, and end one that this process started; also one that is dead."""
    import ray

    if _dead_process() is None:
        ray.shutdown()
        return
    node = _own_node()
    below = _descendants(node)
    thread = threading.Thread(target=ray.shutdown, name="leave", daemon=True)
    thread.start()
    thread.join(STOP_S)
    if node is not None:  # what it has left
        node.kill_all_processes(check_alive=False, allow_graceful=False)
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _own_node() -> Any:
    """Ray's own record of the processes that it started for this one; None if it joined a cluster."""
    from ray._private import worker

    node = worker._global_node
    return node if node is not None and node.is_head() else None


def _descendants(node: Any) -> list[psutil.Process]:
    """Workers and agents, which the system gives other parents once their own are gone."""
    processes: list[psutil.Process] = []
    for infos in node.all_processes.values() if node is not None else ():
        for info in infos:
            with contextlib.suppress(psutil.NoSuchProcess):
                processes += psutil.Process(info.process.pid).children(recursive=True)
    return processes


def _dead_process() -> str | None:
    """One of the processes of a local Ray that has ended by itself, by name."""
    node = _own_node()
    dead = [str(kind) for kind, _ in node.dead_processes()] if node is not None else []
    return next((kind for kind in dead if kind in _VITAL), None)
