"""A sweep over three pretended nodes whose driver, workers, nodes and MLflow server are killed at random.

python benchmarks/soak.py benchmarks/results/soak.json [--trials N] [--minutes M] [--seed S]

The next kill comes when some trial has trained since the last one: a process that is killed while it still imports its
libraries would show nothing, and no trial would ever end. The kills end after M minutes, then the sweep runs to its
end; it is compared with one that nobody disturbed, as in `kills.py`. `make soak` runs it. The exit code is 1 if
something was lost or is wrong.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from disturbed import LONGEST_S, Case, Nodes, Server, losses, prepare
from provenance import write

STEPS = 60
"""Of each trial."""
TRIAL_S = 20.0
"""The longest that a trial may take on average, counted from one start of the sweep, before that counts as a hang."""
LONGEST_PAUSE_S = 15.0
"""Between the first training after a kill and the next kill."""
AWAY_S = 10.0
"""The longest absence of the server."""


class Soak:
    """Kills at random."""

    def __init__(self, case: Case, nodes: Nodes, server: Server, rng: random.Random) -> None:
        self._case, self._nodes, self._server, self._rng = case, nodes, server, rng
        self._acts: dict[str, Callable[[], bool]] = {
            "driver": self._driver, "worker": self._worker, "node": self._node, "server": self._away,
        }  # fmt: skip
        self.kills: Counter[str] = Counter()
        self._back: threading.Thread | None = None
        self._began = time.monotonic()

    def run(self, minutes: float) -> None:
        """Kill for so long, or until the sweep has ended."""
        until = time.monotonic() + 60 * minutes
        while time.monotonic() < until:
            if not (self._case.training() and self._case.pause(LONGEST_PAUSE_S)):
                if self._case.ended() == 0:
                    return
                self._wait_for_server()
                self._case.start()
                continue
            name = self._rng.choice(list(self._acts))
            self.kills[name] += self._acts[name]()
            seconds = time.monotonic() - self._began
            print(f"{seconds:.0f} s: {len(self._case.rows())} rows, {dict(self.kills)}", flush=True)
        self._wait_for_server()

    def finish(self) -> None:
        """Let the sweep run to its end."""
        for _ in range(5):
            if (self._case.codes and self._case.codes[-1] == 0) or self._case.ended() == 0:
                return
            self._case.start()
        self._case.wrong["never ends with 0"] += 1

    def _driver(self) -> bool:
        self._case.last.send(signal.SIGKILL)
        return True

    def _worker(self) -> bool:
        victims = self._case.workers()
        if victims:
            with suppress(psutil.NoSuchProcess):
                self._rng.choice(victims).kill()
        return bool(victims)

    def _node(self) -> bool:
        self._nodes.lose_one(self._rng)
        return True

    def _away(self) -> bool:
        self._wait_for_server()
        self._server.kill()
        seconds = self._rng.uniform(0.0, AWAY_S)

        def back() -> None:
            time.sleep(seconds)
            self._server.start()

        self._back = threading.Thread(target=back, daemon=True)
        self._back.start()
        return True

    def _wait_for_server(self) -> None:
        if self._back is not None:
            self._back.join()


def main(target: Path, trials: int, minutes: float, seed: int) -> int:
    """Soak; returns the exit code."""
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    place, rng = prepare(folder), random.Random(seed)
    nodes, server = Nodes(3, cpus=1), place.server("server")
    try:
        longest_s = LONGEST_S + TRIAL_S * trials

        def sweep(name: str, store: str) -> Case:
            return Case(place, name, store, trials, nodes, rng, changes={"train__steps": STEPS}, longest_s=longest_s)

        undisturbed = sweep("undisturbed", place.database("undisturbed"))
        undisturbed.start()
        if undisturbed.ended() != 0:
            raise RuntimeError(undisturbed.last.output)
        case = sweep("soak", server.uri)
        case.start()
        soak, began = Soak(case, nodes, server, rng), time.monotonic()
        soak.run(minutes)
        soak.finish()
        case.check_end(losses(undisturbed.rows()))
        rows = list(case.rows().values())
        write(target, {
            "trials": trials, "seed": seed, "seconds": round(time.monotonic() - began), "kills": dict(soak.kills),
            "starts": len(case.codes), "exit_codes": dict(Counter(map(str, case.codes))),
            "restarts_of_workers": sum(len(row["restarts"]) for row in rows),
            "resumed": sum(row["resumed_from_step"] is not None for row in rows),
            "finished": sum(row["status"] == "finished" for row in rows), "wrong": dict(+case.wrong),
        })  # fmt: skip
        if +case.wrong:
            print(case.output()[-20000:])
        return int(bool(+case.wrong))
    finally:
        nodes.end()
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(main(options.target, options.trials, options.minutes, options.seed))
