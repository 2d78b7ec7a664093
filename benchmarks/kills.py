"""What is killed in a sweep, and what is lost: each scenario several times, on tiny models on the CPU.

python benchmarks/kills.py benchmarks/results/kills.json [--times N] [SCENARIO ...]

Every scenario disturbs a sweep of three trials, gives the same command again until it ends with 0, and compares what is
there then with a sweep that nobody disturbed: scores to 1e-6, one FINISHED run a trial in MLflow, none left open.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

import tiny  # noqa: E402
from killed import Sweep, write_space  # noqa: E402
from provenance import write  # noqa: E402
from served import Server, Wire  # noqa: E402
from tracked import client_of  # noqa: E402

from ray_peft.store.tracking import default_uri, open_store  # noqa: E402

METHODS = [{"name": "none"}, {"name": "lora", "rank": 4, "lr": 0.001}, {"name": "full", "lr": 0.001}]
STEPS = 40
TOLERANCE = 1e-6


class Case:
    """One sweep to disturb, in a folder of its own."""

    def __init__(self, folder: Path, space: Path, store: str, rng: random.Random) -> None:
        self.folder, self.space, self.store, self.rng = folder, space, store, rng
        self.sweep = Sweep(space, folder / "out", store)
        self.disturbed_at = time.monotonic()

    def trains(self) -> None:
        """Wait until some moment of a training."""
        method, steps = self.rng.choice(["lora", "full"]), self.rng.randint(1, STEPS // 2)
        self.sweep.until(lambda: self.sweep.steps(method) >= steps)

    def writes_a_result(self) -> None:
        """Wait until a worker has written a row that the driver has not listed yet."""
        count = self.rng.randint(1, len(METHODS))
        until = time.monotonic() + 240
        while len(list(self.sweep.out.glob("trials/*/result.json"))) < count and time.monotonic() < until:
            self.sweep.look()
            time.sleep(0.002)


def signals(*numbers: signal.Signals) -> Callable[[Case], None]:
    """Send signals a second apart while a trial trains."""

    def disturb(case: Case) -> None:
        case.trains()
        for place, number in enumerate(numbers):
            time.sleep(1.0 if place else 0.0)
            with suppress(ProcessLookupError):
                case.sweep.send(number)

    return disturb


def kill_driver_at_result(case: Case) -> None:
    """kill -9 of the driver when a worker has just written its row."""
    case.writes_a_result()
    case.sweep.send(signal.SIGKILL)


def kill_worker(case: Case) -> None:
    """kill -9 of the process that trains."""
    case.trains()
    for method in ("lora", "full"):
        if any(case.sweep.out.glob(f"trials/{method}-*/log.txt")):
            case.sweep.kill_worker(method)


def kill_ray(name: str) -> Callable[[Case], None]:
    """kill -9 of one of Ray's own processes."""

    def disturb(case: Case) -> None:
        case.trains()
        case.sweep.kill(name)

    return disturb


LOCAL: dict[str, Callable[[Case], None]] = {
    "kill -9 of the driver": signals(signal.SIGKILL),
    "kill -9 of the driver as a worker writes its row": kill_driver_at_result,
    "kill -9 of a worker": kill_worker,
    "kill -9 of the raylet": kill_ray("raylet"),
    "kill -9 of the raylet's agent": kill_ray("ray::DashboardAgent"),
    "kill -9 of the head (GCS)": kill_ray("gcs_server"),
    "SIGINT": signals(signal.SIGINT),
    "SIGTERM": signals(signal.SIGTERM),
    "SIGHUP": signals(signal.SIGHUP),
    "SIGINT twice": signals(signal.SIGINT, signal.SIGINT),
}


def server_away(seconds: float | None) -> Callable[[Case, Server, Wire], None]:
    """kill -9 of the MLflow server; it is started again after `seconds`, or not before the sweep's end."""

    def disturb(case: Case, server: Server, wire: Wire) -> None:
        case.trains()
        server.kill()
        if seconds is not None:
            time.sleep(seconds)
            server.start()

    return disturb


def cut_often(case: Case, server: Server, wire: Wire) -> None:
    """All connections to the server are cut every 3 s."""

    def cut() -> None:
        while case.sweep.process.poll() is None:
            time.sleep(3.0)
            wire.cut()
            wire.mend()

    threading.Thread(target=cut, daemon=True).start()


SERVED: dict[str, Callable[[Case, Server, Wire], None]] = {
    "MLflow server away for 5 s": server_away(5.0),
    "MLflow server away for 100 s": server_away(100.0),
    "MLflow server away for good": server_away(None),
    "connections to MLflow cut every 3 s": cut_often,
}


def scores(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Held-out losses by method."""
    return {name: row["scores"]["eval_loss"] for name, row in rows.items() if row["status"] == "finished"}


def findings(case: Case, expected: dict[str, float]) -> dict[str, Any]:
    """What is lost or wrong in the end."""
    reached = scores(case.sweep.rows())
    store = open_store(case.store, case.space.stem, None)
    runs = client_of(store).search_runs([store.experiment_id], max_results=1000)
    finished = [run.data.tags["ray_peft.method"] for run in runs if run.info.status == "FINISHED" and
                "ray_peft.method" in run.data.tags]  # fmt: skip
    return {
        "lost": sorted(set(expected) - set(reached)),
        "other_scores": [name for name, loss in reached.items() if abs(loss - expected[name]) > TOLERANCE],
        "twice_in_mlflow": sorted({name for name in finished if finished.count(name) > 1}),
        "not_in_mlflow": sorted(set(expected) - set(finished)),
        "left_open_in_mlflow": sum(run.info.status == "RUNNING" for run in runs),
        "folders_in_ray": len(list((case.sweep.out / "ray").glob("*"))),
    }


def trained_again(case: Case, before: dict[str, dict[str, Any]]) -> list[str]:
    """Trials that had a finished row, and started once more."""
    after = case.sweep.rows()
    return [name for name, row in before.items() if row["status"] == "finished" and
            row["provenance"]["started_at"] != after[name]["provenance"]["started_at"]]  # fmt: skip


def once(name: str, folder: Path, inputs: tuple[Path, Path], expected: dict[str, float], seed: int) -> dict[str, Any]:
    """One disturbed sweep and its repetitions."""
    rng = random.Random(f"{name} {seed}")
    folder.mkdir(parents=True)
    space = write_space(folder / "space.yaml", plain(*inputs))
    server = wire = None
    if name in SERVED:
        server = Server(folder / "served", empty_database(inputs[0].parent))
        server.start()
        wire = Wire(server.port)
        store = f"http://127.0.0.1:{wire.port}"
    else:
        store = f"sqlite:///{folder / 'mlflow.db'}"
    case = Case(folder, space, store, rng)
    try:
        if name in SERVED:
            SERVED[name](case, server, wire)
        else:
            LOCAL[name](case)
        began = time.monotonic()
        codes = [case.sweep.wait(600)]
        ended_s = round(time.monotonic() - began, 1)
        left = case.sweep.left()
        before = left_rows(case)
        if server is not None and server.process is None:
            server.start()
        tracebacks = case.sweep.output.count("Traceback")
        restarts = sum(len(row["restarts"]) for row in case.sweep.rows().values())
        while codes[-1] != 0 and len(codes) < 4:
            case.sweep = Sweep(space, folder / "out", store)
            codes.append(case.sweep.wait(600))
        return {
            "exit_codes": codes, "seconds_to_the_end": ended_s, "processes_left": left, "tracebacks": tracebacks,
            "restarts": restarts, "trained_again": trained_again(case, before), **findings(case, expected),
        }  # fmt: skip
    finally:
        case.sweep.end()
        if wire is not None:
            wire.cut()
        if server is not None:
            server.kill()


def left_rows(case: Case) -> dict[str, dict[str, Any]]:
    """Rows that were there when the first process had ended: those of its ledger, and those that workers left."""
    rows = case.sweep.rows()
    for path in case.sweep.out.glob("trials/*/result.json"):
        row = json.loads(path.read_text())
        rows.setdefault(row["spec"]["method"]["name"], row)
        if row["status"] == "finished":
            rows[row["spec"]["method"]["name"]] = row
    return rows


def plain(model: Path, data: Path) -> dict[str, Any]:
    """The search space; trials keep checkpoints."""
    changes = {"train__steps": STEPS, "train__checkpoint_every": 5, "evaluation__generate": False}
    return tiny.plain_spec(model, data, {"grid": METHODS}, **changes)


def empty_database(folder: Path) -> Path:
    """A SQLite store without runs: building the schema takes seconds."""
    if not (folder / "empty" / "mlflow.db").exists():
        (folder / "empty").mkdir()
        open_store(default_uri(folder / "empty"), "unused", folder / "empty" / "artifacts")
    return folder / "empty" / "mlflow.db"


def main(target: Path, times: int, chosen: list[str]) -> None:
    """Run the scenarios; the result is written after each, so that a late failure loses nothing."""
    folder = Path(tempfile.mkdtemp(prefix="kills"))
    os.environ |= {"HF_HUB_OFFLINE": "1", "RAY_PEFT_OUTPUTS": str(folder / "outputs")}
    os.environ["RAY_PEFT_CACHE"] = str(folder / "cache")
    inputs = tiny.build_model(folder / "model"), tiny.write_rows(folder / "rows.jsonl", tiny.QUESTIONS)
    undisturbed = Sweep(write_space(folder / "space.yaml", plain(*inputs)), folder / "out", f"sqlite:///{folder}/u.db")
    assert undisturbed.wait() == 0, undisturbed.output
    expected = scores(undisturbed.rows())
    measured: dict[str, Any] = json.loads(target.read_text()).get("scenarios", {}) if target.exists() else {}
    try:
        for seed in range(times):  # every scenario once, then every one again
            for name in chosen or [*LOCAL, *SERVED]:
                print(f"== {name}, {seed + 1} of {times}", flush=True)
                place = folder / f"{name} {seed}".replace(" ", "_").replace("'", "")
                try:
                    found = once(name, place, inputs, expected, seed)
                except Exception as error:  # a benchmark reports what failed and goes on
                    found = {"error": f"{type(error).__name__}: {error}"[-2000:]}
                measured.setdefault(name, []).append(found)
                write(target, {"trials": len(METHODS), "steps": STEPS, "scenarios": measured})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(measured))


WRONG = ("lost", "other_scores", "twice_in_mlflow", "not_in_mlflow", "left_open_in_mlflow", "trained_again",
         "processes_left", "tracebacks", "folders_in_ray", "error")  # fmt: skip


def table(measured: dict[str, list[dict[str, Any]]]) -> str:
    """What stands in the documentation."""
    lines = [
        "| what | times | lost or wrong | exit codes | seconds to the end |",
        "| :--- | ---: | :--- | :--- | ---: |",
    ]
    for name, runs in measured.items():
        wrong = [f"{key}: {run[key]}" for run in runs for key in WRONG if run.get(key)]
        codes = sorted({", ".join(map(str, run["exit_codes"])) for run in runs if "exit_codes" in run})
        seconds = [run["seconds_to_the_end"] for run in runs if "seconds_to_the_end" in run]
        span = f"{min(seconds):.0f} to {max(seconds):.0f}" if seconds else "-"
        lines.append(f"| {name} | {len(runs)} | {'; '.join(wrong) or 'nothing'} | {' or '.join(codes)} | {span} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("scenarios", nargs="*", help=", ".join([*LOCAL, *SERVED]))
    options = parser.parse_intermixed_args()
    if unknown := set(options.scenarios) - {*LOCAL, *SERVED}:
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}; there are {', '.join([*LOCAL, *SERVED])}")
    main(options.target, options.times, options.scenarios)
