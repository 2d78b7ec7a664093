"""A sweep of tiny trials on the CPU that is disturbed, given again until it ends with 0, and compared with one that
nobody disturbed. What `kills.py` and `soak.py` share.

The command runs in processes that are forked from one that has imported the libraries, and Ray is a cluster that stays:
so a start takes seconds, and can be repeated often.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import tiny  # noqa: E402
from killed import write_space  # noqa: E402
from served import Server, Wire  # noqa: E402
from tracked import client_of  # noqa: E402

STEPS = 120
TOLERANCE = 1e-6
PACK_TOLERANCE = 1e-4
"""A trial that goes on by itself, or in a smaller pack, rounds its sums otherwise."""
LONGEST_S = 400.0
"""No start of a sweep of a few trials may take longer."""
PRELOADED = ["ray_peft.cli", "ray_peft.schedule.sweep", "ray_peft.schedule.sync", "transformers", "peft", "mlflow",
             "ray.tune"]  # fmt: skip

_processes = multiprocessing.get_context("forkserver")


def methods(count: int) -> list[dict[str, Any]]:
    """The untouched base, and LoRA and full fine-tuning at several rates."""
    trained = [
        {"name": "lora", "rank": 4, "lr": round(1e-3 * (1 + place / 100), 6)} if place % 2 else
        {"name": "full", "lr": round(1e-3 * (1 + place / 100), 6)}
        for place in range(1, count)
    ]  # fmt: skip
    return [{"name": "none"}, *trained]


@dataclass(frozen=True)
class Place:
    """What all sweeps of one call share."""

    folder: Path
    model: Path
    rows: Path
    empty_database: Path

    def space(self, name: str, trials: int, **changes: Any) -> Path:
        """A search space file of that many trials, which keep checkpoints."""
        settings = {
            "train__steps": STEPS, "train__checkpoint_every": 5, "evaluation__generate": False,
            "resources__cpus_per_worker": 1, "resources__max_failures": 1000, **changes,
        }  # fmt: skip
        plain = tiny.plain_spec(self.model, self.rows, {"grid": methods(trials)}, **settings)
        return write_space(self.folder / f"{name}.yaml", plain)

    def database(self, name: str) -> str:
        """The URI of a new SQLite store: building its schema takes seconds, so it is copied."""
        shutil.copy(self.empty_database, self.folder / f"{name}.db")
        return f"sqlite:///{self.folder / name}.db"

    def server(self, name: str) -> Server:
        """A new MLflow server, which is running."""
        server = Server(self.folder / name, self.empty_database)
        server.start()
        return server


def prepare(folder: Path) -> Place:
    """Make the model, the rows and an empty store."""
    from ray_peft.store.tracking import default_uri, open_store

    os.environ |= {
        "HF_HUB_OFFLINE": "1", "RAY_PEFT_OUTPUTS": str(folder / "outputs"), "RAY_PEFT_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's 15 would starve them on a machine that does other things as well
    }  # fmt: skip
    _processes.set_forkserver_preload(PRELOADED)
    (folder / "empty").mkdir()
    open_store(default_uri(folder / "empty"), "unused", folder / "empty" / "artifacts")
    return Place(
        folder,
        tiny.build_model(folder / "model"),
        tiny.write_rows(folder / "rows.jsonl", tiny.QUESTIONS),
        folder / "empty" / "mlflow.db",
    )


class Nodes:
    """A Ray cluster of pretended nodes on this machine, which outlives the sweeps that join it."""

    def __init__(self, nodes: int, cpus: int) -> None:
        from ray.cluster_utils import Cluster

        self._cpus = cpus
        settings = {"include_dashboard": False, "object_store_memory": 2**27}
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, **settings})
        self.others = [self._cluster.add_node(num_cpus=cpus, object_store_memory=2**27) for _ in range(nodes - 1)]
        self.address = self._cluster.address

    def lose_one(self, rng: random.Random) -> None:
        """kill -9 of the raylet of a node other than the head, which is replaced by a new one."""
        lost = self.others.pop(rng.randrange(len(self.others)))
        self._cluster.remove_node(lost, allow_graceful=False)
        self.others.append(self._cluster.add_node(num_cpus=self._cpus, object_store_memory=2**27))

    def processes(self) -> list[psutil.Process]:
        """Its workers: below this process, beside the cluster's own."""
        return [process for process in psutil.Process().children(recursive=True) if _name(process).startswith("ray::")]

    def end(self) -> None:
        """End all of it."""
        self._cluster.shutdown()


def _command(arguments: list[str], log: str) -> None:
    """In a forked process: `ray-peft ARGUMENTS`."""
    os.setsid()
    with open(log, "a") as output:  # noqa: PTH123
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = ["ray-peft", *arguments]
    from ray_peft.cli import main

    sys.exit(main(arguments))


class Start:
    """One start of a command."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log, self.began = log, time.time()
        self.process: Any = _processes.Process(target=_command, args=(arguments, str(log)))
        self.process.start()
        self._family: dict[int, psutil.Process] = {}

    @property
    def alive(self) -> bool:
        self.look()
        return bool(self.process.exitcode is None)

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def look(self) -> list[psutil.Process]:
        """What it has started, which is remembered."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self._family.setdefault(process.pid, process)
        return list(self._family.values())

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code; None if it did not end in time and was killed."""
        until = time.monotonic() + timeout_s
        while self.alive and time.monotonic() < until:
            self.process.join(0.2)
        code: int | None = self.process.exitcode
        if code is None:
            self.send(signal.SIGKILL)
            self.process.join()
        return code

    def left(self, patience_s: float = 75.0) -> list[str]:
        """Names of its processes that are still there; Ray's agents look for their head for a minute."""
        _, alive = psutil.wait_procs(self._family.values(), timeout=patience_s)
        names = [_name(process) for process in alive if _name(process)]
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return names


@dataclass
class Case:
    """One sweep that is disturbed, and what came of it."""

    place: Place
    name: str
    store: str
    trials: int
    nodes: Nodes | None
    """The cluster that it joins; None starts a local Ray each time."""
    rng: random.Random
    folder: Path | None = None
    """Of its results; None is one in `place`."""
    changes: dict[str, Any] = field(default_factory=dict)
    longest_s: float = LONGEST_S
    """A start that takes longer counts as one that hangs."""
    tolerance: float = TOLERANCE
    """Of held-out losses."""
    codes: list[int | None] = field(default_factory=list)
    """Exit codes of its starts."""
    wrong: Counter[str] = field(default_factory=Counter)
    listed: dict[str, str] = field(default_factory=dict)
    """Trials that had a finished row at some start's end, with the moment they were started at."""

    def __post_init__(self) -> None:
        self.space = self.place.space(self.name, self.trials, **self.changes)
        self.out = self.folder or self.place.folder / self.name
        self.starts: list[Start] = []

    def start(self, *command: str) -> Start:
        """Give a command, the sweep's own if none is named."""
        arguments = [*command]
        if not command:
            arguments = ["sweep", str(self.space), "--out", str(self.out), "--tracking-uri", self.store]
            arguments += ["--address", self.nodes.address] if self.nodes is not None else []
        self.starts.append(Start(arguments, self.place.folder / f"{self.name}.{len(self.starts)}.log"))
        return self.starts[-1]

    @property
    def last(self) -> Start:
        return self.starts[-1]

    def ended(self) -> int | None:
        """Wait for the end of the last start, and check what it left."""
        code = self.last.wait(self.longest_s)
        self.codes.append(code)
        self.wrong["hangs"] += code is None
        self.wrong["tracebacks"] += self.last.output.count("Traceback")
        for trial_id, began in self.listed.items():
            row = self.rows().get(trial_id)
            self.wrong["trained again"] += row is None or row["provenance"]["started_at"] != began
        self.listed |= {key: row["provenance"]["started_at"] for key, row in self.rows().items() if _finished(row)}
        return code

    def check_left(self) -> None:
        """Processes that the last start left: its own, and workers of the cluster that still hold a file of it."""
        self.wrong["processes left"] += len(self.last.left())
        until = time.monotonic() + 15
        while self.nodes is not None and self.workers() and time.monotonic() < until:
            time.sleep(0.5)
        self.wrong["processes left"] += len(self.workers()) if self.nodes is not None else 0

    def rows(self) -> dict[str, dict[str, Any]]:
        """By trial id: the last row of the ledger, or the finished one that a worker left beside it."""
        path = self.out / "results.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        rows = {row["trial_id"]: row for row in (json.loads(line) for line in lines if line.endswith(b"\n"))}
        for file in self.out.glob("trials/*/result.json"):
            row = json.loads(file.read_text(encoding="utf-8"))
            if _finished(row) and not _finished(rows.get(row["trial_id"], {})):
                rows[row["trial_id"]] = row
        return rows

    def workers(self) -> list[psutil.Process]:
        """The processes that write a log of a trial now."""
        processes = self.nodes.processes() if self.nodes is not None else self.last.look()
        return [process for process in processes if any(str(self.out) in path for path in _open_files(process))]

    def kill(self, name: str) -> bool:
        """kill -9 of what the last start has started under a name that begins so; false if there is none."""
        victims = [process for process in self.last.look() if _name(process).startswith(name)]
        for process in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return bool(victims)

    def output(self) -> str:
        """What the starts have printed."""
        return "".join(start.output for start in self.starts)

    def training(self) -> bool:
        """Wait until this start has trained some steps, and a random while; false if it ended before."""
        seen = {path: path.stat().st_mtime for path in self._logs()}
        now = time.time()

        def trains() -> bool:
            return any(path.stat().st_mtime > max(seen.get(path, 0.0), now) for path in self._logs() if path.exists())

        return self.until(trains) and self.pause(1.5)

    def _logs(self) -> list[Path]:
        return list(self.out.glob("trials/*/metrics.jsonl"))

    def row_written(self) -> bool:
        """Wait until a worker has just written a finished row."""
        before = {path.name for path in self._results()}
        return self.until(lambda: any(path.name not in before for path in self._results()), 0.005) and self.pause(0.15)

    def _results(self) -> list[Path]:
        return [
            path.parent for path in self.out.glob("trials/*/result.json")
            if path.stat().st_mtime > self.last.began and '"status": "finished"' in path.read_text()[:400]
        ]  # fmt: skip

    def pause(self, most_s: float) -> bool:
        """Wait for a random time; false if the sweep ended meanwhile."""
        time.sleep(self.rng.uniform(0, most_s))
        return self.last.alive

    def until(self, condition: Callable[[], bool], every_s: float = 0.03) -> bool:
        """Wait for something that happens while it runs; false if it ended, or hangs."""
        until = time.monotonic() + self.longest_s
        while self.last.alive and time.monotonic() < until:
            if condition():
                return self.last.alive
            time.sleep(every_s)
        return False

    def check_end(self, expected: dict[str, float]) -> None:
        """Compare with a sweep that nobody disturbed."""
        from ray_peft.store.tracking import open_store

        reached = losses(self.rows())
        self.wrong["trials lost"] += len(set(expected) - set(reached))
        self.wrong["other scores"] += sum(
            abs(loss - expected[trial]) > self.tolerance for trial, loss in reached.items() if trial in expected
        )
        store = open_store(self.store, self.space.stem, None)
        runs = client_of(store).search_runs([store.experiment_id], max_results=5000)
        finished = Counter(run.data.tags.get("ray_peft.trial_id") for run in runs if run.info.status == "FINISHED")
        del finished[None]  # the sweep's own run
        self.wrong["twice in MLflow"] += sum(count > 1 for count in finished.values())
        self.wrong["not in MLflow"] += len(set(expected) - set(finished))
        self.wrong["left open in MLflow"] += sum(run.info.status == "RUNNING" for run in runs)
        self.wrong["points lost in MLflow"] += self._points_lost(store, runs)
        self.wrong["folders left in OUT/ray"] += len(list((self.out / "ray").glob("*")))

    def _points_lost(self, store: Any, runs: list[Any]) -> int:
        """Training losses of finished runs that the trial's own log has and MLflow has not, or has twice."""
        lost = 0
        for run in runs:
            trial_id = run.data.tags.get("ray_peft.trial_id")
            log = self.out / "trials" / str(trial_id) / "metrics.jsonl"
            if run.info.status != "FINISHED" or not log.exists():
                continue
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            own = [line["train_loss"] for line in lines if "train_loss" in line]
            sent = [point.value for point in client_of(store).get_metric_history(run.info.run_id, "train_loss")]
            lost += sent != own
        return lost


def losses(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Held-out losses of finished rows by trial id."""
    return {trial_id: row["scores"]["eval_loss"] for trial_id, row in rows.items() if _finished(row)}


def _finished(row: dict[str, Any]) -> bool:
    return row.get("status") == "finished"


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(process.name())
    return ""


def _open_files(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return [file.path for file in process.open_files()]
    return []


__all__ = [
    "LONGEST_S",
    "PACK_TOLERANCE",
    "Case",
    "Nodes",
    "Place",
    "Server",
    "Start",
    "Wire",
    "losses",
    "prepare",
]
