"""What is killed in a sweep, and what is lost: each scenario several times, on tiny models on the CPU.

python benchmarks/kills.py benchmarks/results/kills.json [--times N] [--cpus N] [SCENARIO ...]

A scenario disturbs one sweep again and again at random moments, with the command given again where it ended, until it
was disturbed N times; then the sweep runs to its end, and is compared with one that nobody disturbed: scores to 1e-6,
one FINISHED run a trial in MLflow with every loss once, none left open, nothing that had finished trained again. A
scenario that was measured before is measured again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from disturbed import PACK_TOLERANCE, Case, Nodes, Place, Server, Wire, full_disk, losses, prepare
from provenance import write

TRIALS = 5
LONG_STEPS = 400
"""Steps of a trial that lasts while a server is away for long."""


@dataclass(frozen=True)
class Scenario:
    """What is done to a sweep."""

    act: Callable[[Case], bool]
    """Disturbs it once, at a random moment; false if the sweep ended before that."""
    local: bool = False
    """Each start has a Ray of its own, since that is what dies."""
    ends: bool = False
    """The command ends by it, and is given again."""
    pack: bool = False
    """The LoRA trials train together."""


def signals(*numbers: signal.Signals) -> Callable[[Case], bool]:
    """Send signals a second apart while a trial trains."""

    def act(case: Case) -> bool:
        if not case.training():
            return False
        for place, number in enumerate(numbers):
            time.sleep(1.0 if place else 0.0)
            case.last.send(number)
        return True

    return act


def kill_driver_at_row(case: Case) -> bool:
    """kill -9 of the driver when a worker has just written its row."""
    if not case.row_written():
        return False
    case.last.send(signal.SIGKILL)
    return True


def kill_worker(case: Case) -> bool:
    """kill -9 of the process that trains."""
    if not case.training():
        return False
    victims = case.workers()
    for process in victims:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return bool(victims)


def kill_ray(name: str) -> Callable[[Case], bool]:
    """kill -9 of one of a local Ray's own processes."""

    def act(case: Case) -> bool:
        return case.training() and case.kill(name)

    return act


def damage(case: Case) -> bool:
    """kill -9 of the driver; then each trial's newest checkpoint is cut, emptied, changed or removed."""
    if not case.training():
        return False
    case.last.send(signal.SIGKILL)
    case.last.wait(case.longest_s)
    time.sleep(1.0)  # its workers follow
    hit = False
    for stage in case.out.glob("trials/*/stage*"):
        files = sorted(stage.glob("checkpoint-*/state.pt"), key=lambda file: file.stat().st_mtime)
        if len(files) < 2 or not files[-1].stat().st_size:
            continue
        content, how = files[-1].read_bytes(), case.rng.randrange(4)
        if how == 0:
            files[-1].unlink()
        else:
            middle = len(content) // 2
            changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            files[-1].write_bytes([b"", content[:middle], changed][how - 1])
        hit = True
    return hit


def fill_disk(case: Case) -> bool:
    """The disk below --out is full from a random moment on, until the command has ended."""
    if not case.training():
        return False
    with suppress(OSError), (case.out / ".filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**12))
    case.last.wait(case.longest_s)
    (case.out / ".filler").unlink()
    return True


LOCAL = {
    "kill -9 of the raylet": Scenario(kill_ray("raylet"), local=True),
    "kill -9 of the raylet's agent": Scenario(kill_ray("ray::DashboardAgent"), local=True),
    "kill -9 of the head (GCS)": Scenario(kill_ray("gcs_server"), local=True),
    "kill -9 of the driver, which has a local Ray": Scenario(signals(signal.SIGKILL), local=True, ends=True),
    "Ctrl-C of a sweep that has a local Ray": Scenario(signals(signal.SIGINT), local=True, ends=True),
    "kill -9 of the raylet under a pack": Scenario(kill_ray("raylet"), local=True, pack=True),
}
JOINED = {
    "kill -9 of the driver": Scenario(signals(signal.SIGKILL), ends=True),
    "kill -9 of the driver as a worker writes its row": Scenario(kill_driver_at_row, ends=True),
    "kill -9 of a worker": Scenario(kill_worker),
    "SIGINT": Scenario(signals(signal.SIGINT), ends=True),
    "SIGTERM": Scenario(signals(signal.SIGTERM), ends=True),
    "SIGHUP": Scenario(signals(signal.SIGHUP), ends=True),
    "SIGINT twice": Scenario(signals(signal.SIGINT, signal.SIGINT), ends=True),
    "SIGINT of a pack": Scenario(signals(signal.SIGINT), ends=True, pack=True),
    "kill -9 of a pack's worker": Scenario(kill_worker, pack=True),
    "newest checkpoints damaged after kill -9 of the driver": Scenario(damage, ends=True),
    "disk full": Scenario(fill_disk, ends=True),
}
SERVED = ("MLflow server away for 5 s", "connections to MLflow cut every 3 s", "MLflow server away for good",
          "MLflow server away for 70 s")  # fmt: skip
"""70 s are more than the 60 s for which a call to the store is repeated (`PATIENCE_S` of store/tracking/store.py)."""


class Measured:
    """What came of the scenarios; written after every sweep, so that a late failure loses nothing."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self.scenarios: dict[str, Any] = json.loads(target.read_text())["scenarios"] if target.exists() else {}

    def add(self, name: str, case: Case, times: int, seconds: list[float]) -> None:
        """Take what one sweep showed."""
        rows = list(case.rows().values())
        entry = self.scenarios.setdefault(name, {"times": 0, "sweeps": 0, "exit_codes": {}, "seconds": [], "wrong": {},
                                                 "restarts": 0, "resumed": 0})  # fmt: skip
        entry["times"] += times
        entry["sweeps"] += 1
        entry["exit_codes"] = dict(Counter(entry["exit_codes"]) + Counter(map(str, case.codes)))
        entry["seconds"] += [round(value, 1) for value in seconds]
        entry["wrong"] = dict(Counter(entry["wrong"]) + case.wrong)
        entry["restarts"] += sum(len(row["restarts"]) for row in rows)
        entry["resumed"] += sum(row["resumed_from_step"] is not None for row in rows)
        if +case.wrong:
            entry["output"] = case.output()[-6000:]
        self.write()

    def failed(self, name: str, error: Exception) -> None:
        """A scenario that could not be measured."""
        self.scenarios.setdefault(name, {"times": 0})["error"] = f"{type(error).__name__}: {error}"[-2000:]
        self.write()

    def write(self) -> None:
        write(self._target, {"trials": TRIALS, "scenarios": self.scenarios})


class Table:
    """Runs scenarios."""

    def __init__(self, place: Place, nodes: Nodes, measured: Measured, times: int) -> None:
        self.place, self.nodes, self.measured, self.times = place, nodes, measured, times
        self.expected = self.undisturbed()

    def undisturbed(self, **changes: Any) -> dict[str, float]:
        """Held-out losses by trial id, as they must be."""
        label = f"undisturbed{'_'.join(map(str, changes.values()))}"
        case = self.case(label, self.place.database(label), **changes)
        case.start()
        if case.ended() != 0:
            raise RuntimeError(case.last.output)
        return losses(case.rows())

    def case(self, name: str, store: str, *, local: bool = False, folder: Path | None = None, **changes: Any) -> Case:
        """A sweep that is not started yet."""
        seed = random.Random(name)
        return Case(self.place, name, store, TRIALS, None if local else self.nodes, seed, folder, changes)

    def killed(self, name: str, scenario: Scenario) -> None:
        """Sweeps on SQLite."""
        changes = {"train__pack": True} if scenario.pack else {}
        expected = self.undisturbed(**changes) if changes else self.expected
        done = sweeps = 0
        while done < self.times:
            label = f"{''.join(letter for letter in name if letter.isalnum())}{sweeps}"
            with ExitStack() as disk:
                folder = None
                if name == "disk full":
                    folder = disk.enter_context(full_disk(self.place.folder / f"{label}_disk", 30)) / "out"
                case = self.case(label, self.place.database(label), local=scenario.local, folder=folder, **changes)
                case.tolerance = PACK_TOLERANCE if scenario.pack else case.tolerance
                happened, seconds = self.run(case, scenario, self.times - done)
                case.check_end(expected)
                self.measured.add(name, case, happened, seconds)
            done += happened
            sweeps += 1

    def run(self, case: Case, scenario: Scenario, times: int) -> tuple[int, list[float]]:
        """Start, disturb and start again until the sweep has ended with 0; how often, and seconds to the ends."""
        happened, seconds = 0, []
        while not case.codes or case.codes[-1] != 0:
            case.start()
            while case.last.alive and happened < times:
                if not scenario.act(case):
                    break
                happened += 1
                if scenario.ends:
                    break
            began = time.monotonic()
            code = case.ended()
            if scenario.ends and code != 0:
                seconds.append(time.monotonic() - began)
                case.check_left()
            if len(case.codes) > 3 * times + 3:
                case.wrong["never ends with 0"] += 1
                break
        return happened, seconds

    def served(self, name: str) -> None:
        """Sweeps with a real MLflow server."""
        label = "".join(letter for letter in name if letter.isalnum())
        server = self.place.server(f"{label}server")
        wire = Wire(server.port)
        try:
            if " away for 5 s" in name:
                self.away(name, label, server, 5.0)
            elif " away for 70 s" in name:
                self.away(name, label, server, 70.0)
            elif name.endswith("good"):
                self.gone(name, label, server)
            else:
                self.cut(name, label, wire)
        finally:
            wire.cut()
            server.kill()

    def away(self, name: str, label: str, server: Server, seconds: float) -> None:
        """The server is killed again and again, and is back after some time."""
        changes = {"train__steps": LONG_STEPS} if seconds > 30 else {}
        expected = self.undisturbed(**changes) if changes else self.expected
        done = sweeps = 0
        while done < self.times:
            case = self.case(f"{label}{sweeps}", server.uri, **changes)
            case.start()
            happened = 0
            with slowed(case) if seconds > 30 else ExitStack():
                while happened < self.times - done and case.training():
                    server.kill()
                    time.sleep(seconds)
                    server.start()
                    happened += 1
                    time.sleep(5.0)
            while case.ended() != 0 and len(case.codes) < 4:
                case.start()
            case.check_end(expected)
            self.measured.add(name, case, happened, [])
            done += happened
            sweeps += 1

    def gone(self, name: str, label: str, server: Server) -> None:
        """The server is killed and stays away until the sweep has ended; then `ray-peft sync`."""
        for number in range(self.times):
            case = self.case(f"{label}{number}", server.uri)
            case.start()
            happened = case.training()
            server.kill()
            began = time.monotonic()
            code = case.ended()
            seconds = time.monotonic() - began
            case.wrong["exit code other than 3"] += code != 3
            server.start()
            case.start("sync", str(case.out))
            case.wrong["sync fails"] += case.ended() != 0
            case.check_end(self.expected)
            self.measured.add(name, case, int(happened), [seconds])

    def cut(self, name: str, label: str, wire: Wire) -> None:
        """All connections to the server are cut every 3 s."""
        done = sweeps = 0
        while done < self.times:
            case = self.case(f"{label}{sweeps}", f"http://127.0.0.1:{wire.port}")
            case.start()
            happened = 0
            while case.last.alive:
                time.sleep(3.0)
                wire.cut()
                wire.mend()
                happened += 1
            while case.ended() != 0 and len(case.codes) < 4:
                case.start()
            case.check_end(self.expected)
            self.measured.add(name, case, happened, [])
            done += happened
            sweeps += 1


class slowed:  # noqa: N801  # a context
    """Lets a sweep's workers run a tenth of the time, so that it lasts long and takes little of the machine."""

    def __init__(self, case: Case) -> None:
        self._case, self._done = case, threading.Event()
        self._thread = threading.Thread(target=self._slow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _slow(self) -> None:
        while not self._done.wait(0.1):
            stopped = self._case.workers()
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            self._done.wait(0.9)
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.resume()


def table(scenarios: dict[str, Any]) -> str:
    """What stands in the documentation."""
    lines = [
        "| what | times | lost or wrong | exit codes | seconds to the end |",
        "| :--- | ---: | :--- | :--- | ---: |",
    ]
    for name, entry in scenarios.items():
        wrong = "; ".join(f"{what}: {count}" for what, count in entry.get("wrong", {}).items() if count)
        codes = ", ".join(f"{code} ({count})" for code, count in entry.get("exit_codes", {}).items())
        seconds = entry.get("seconds") or []
        span = f"{min(seconds):.0f} to {max(seconds):.0f}" if seconds else "-"
        lines.append(f"| {name} | {entry['times']} | {wrong or entry.get('error') or 'nothing'} | {codes} | {span} |")
    return "\n".join(lines)


def main(target: Path, times: int, cpus: int, chosen: list[str]) -> None:
    """Run the scenarios."""
    folder = Path(tempfile.mkdtemp(prefix="kills"))
    measured = Measured(target)
    place = prepare(folder)
    nodes = Nodes(1, cpus)
    try:
        runs = Table(place, nodes, measured, times)
        for name in chosen:
            print(f"== {name}", flush=True)
            measured.scenarios.pop(name, None)
            try:
                if name in SERVED:
                    runs.served(name)
                else:
                    runs.killed(name, {**JOINED, **LOCAL}[name])
            except Exception as error:  # a benchmark reports what failed and goes on
                measured.failed(name, error)
    finally:
        nodes.end()
        shutil.rmtree(folder, ignore_errors=True)
    print(table(measured.scenarios))


if __name__ == "__main__":
    known = [*JOINED, *SERVED, *LOCAL]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--cpus", type=int, default=2, help="trials at once; default: 2")
    parser.add_argument("scenarios", nargs="*", help=", ".join(known))
    options = parser.parse_intermixed_args()
    if unknown := set(options.scenarios) - set(known):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    main(options.target, options.times, options.cpus, options.scenarios or known)
