"""What came of the scenarios of `kills.py`: a JSON file, and a table for the documentation."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from disturbed import Case
from provenance import write


class Measured:
    """What came of the scenarios; written after every sweep, so that a late failure loses nothing."""

    def __init__(self, target: Path, trials: int) -> None:
        self._target, self._trials = target, trials
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
        write(self._target, {"trials": self._trials, "scenarios": self.scenarios})


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
