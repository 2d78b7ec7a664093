"""What is killed in a sweep, and what is lost: each scenario several times, on tiny models on the CPU.

python benchmarks/kills.py benchmarks/results/kills.json [--times N] [--cpus N] [--minutes M] [SCENARIO ...]

A scenario disturbs one sweep again and again at random moments, with the command given again where it ended, until it
was disturbed N times; then the sweep runs to its end, and is compared with one that nobody disturbed: scores to 1e-6
(1e-4 where trials train together), one FINISHED run a trial in MLflow with every loss once, none left open, nothing
that had finished trained again. A scenario that was measured before is measured again.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from disturbed import PACK_TOLERANCE, Case, Nodes, Place, Server, Wire, losses, prepare
from kill_table import Measured, table

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


class Table:
    """Runs scenarios."""

    def __init__(self, place: Place, nodes: Nodes, measured: Measured, times: int, minutes: float) -> None:
        self.place, self.nodes, self.measured, self.times = place, nodes, measured, times
        self._until = time.monotonic() + 60 * minutes
        self.undisturbed = cache(self._undisturbed)
        self.expected = self.undisturbed()

    @property
    def late(self) -> bool:
        """True once nothing more is disturbed: what runs goes on to its end."""
        return time.monotonic() > self._until

    def _undisturbed(self, **changes: Any) -> dict[str, float]:
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
        expected = self.undisturbed(**changes)
        done = sweeps = 0
        while done < self.times and not self.late:
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
            while case.last.alive and happened < times and not self.late:
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
        expected = self.undisturbed(**changes)
        done = sweeps = 0
        while done < self.times and not self.late:
            case = self.case(f"{label}{sweeps}", server.uri, **changes)
            case.start()
            happened = 0
            with slowed(case) if seconds > 30 else ExitStack():
                while happened < self.times - done and not self.late and case.training():
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
            if self.late:
                break
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
        while done < self.times and not self.late:
            case = self.case(f"{label}{sweeps}", f"http://127.0.0.1:{wire.port}")
            case.start()
            happened = 0
            while case.last.alive and not self.late:
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


@contextmanager
def full_disk(folder: Path, size_mib: int) -> Iterator[Path]:
    """A small disk of its own in memory, mounted at `folder`. Needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


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


def main(target: Path, times: int, cpus: int, minutes: float, chosen: list[str]) -> None:
    """Run the scenarios."""
    folder = Path(tempfile.mkdtemp(prefix="kills"))
    measured = Measured(target, TRIALS)
    place = prepare(folder)
    nodes = Nodes(1, cpus)
    try:
        runs = Table(place, nodes, measured, times, minutes)
        for name in chosen:
            if runs.late:
                break
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
    parser.add_argument("--minutes", type=float, default=600.0, help="begin nothing new after so long; default: 600")
    parser.add_argument("scenarios", nargs="*", help=", ".join(known))
    options = parser.parse_intermixed_args()
    if unknown := set(options.scenarios) - set(known):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    main(options.target, options.times, options.cpus, options.minutes, options.scenarios or known)
