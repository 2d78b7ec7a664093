"""What trials of one process report, on its way to the Tune trial of each: a file of lines for each trial."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray_peft.engine import stopping
from ray_peft.foundation.json_lines import added_lines
from ray_peft.foundation.whole import write_text

POLL_S = 0.2
VERDICT_POLL_S = 0.02
VERDICT_PATIENCE_S = 60.0
"""The processes that pass reports on may just be starting."""
_END = "ended"


class Relay:
    """Files in a folder that the process which trains, the Tune trials and the driver share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self, trial_id: str) -> None:
        """Make the file; after what a process that was killed left in the middle of a line, a new one begins."""
        self._write(trial_id, "\n")

    def put(self, trial_id: str, report: Mapping[str, Any]) -> None:
        """Pass a report on."""
        self._write(trial_id, json.dumps(dict(report)) + "\n")

    def end(self, trial_id: str) -> None:
        """Nothing comes any more."""
        self.put(trial_id, {_END: True})

    def judged(self, trial_id: str, step: int) -> None:
        """The driver has compared what the trial has reported of a step."""
        write_text(self._folder / f"{trial_id}.judged", str(step))

    def wait_until_judged(self, trial_id: str, step: int) -> None:
        """Wait for that, unless the process is told to stop; not for ever, as the driver's word is found later, too."""
        until = time.monotonic() + VERDICT_PATIENCE_S
        while time.monotonic() < until and not stopping.is_told():
            with contextlib.suppress(OSError, ValueError):
                if int((self._folder / f"{trial_id}.judged").read_text(encoding="utf-8")) >= step:
                    return
            time.sleep(VERDICT_POLL_S)

    def move(self, trial_id: str, place: int, config: Mapping[str, Any]) -> None:
        """A trial, as Tune's configuration says it, is trained by the process of the run at `place`, and no other."""
        write_text(self._folder / f"{trial_id}.moved", json.dumps({"to": place, "config": dict(config)}))

    def moved(self) -> dict[str, tuple[int, dict[str, Any]]]:
        """All of these: by trial id, the place and the configuration."""
        moved = {}
        for path in sorted(self._folder.glob("*.moved")):
            entry = json.loads(path.read_text(encoding="utf-8"))
            moved[path.stem] = (int(entry["to"]), entry["config"])
        return moved

    def follow(self, trial_id: str) -> Iterator[dict[str, Any]]:
        """All reports of a trial, those to come as well, until its end."""
        offset = 0
        while True:
            lines, offset = added_lines(self._file(trial_id), offset)
            for line in lines:
                try:
                    report = json.loads(line)
                except ValueError:  # cut off by a kill
                    continue
                if _END in report:
                    return
                yield report
            if not lines:
                time.sleep(POLL_S)

    def _write(self, trial_id: str, text: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._file(trial_id).open("a", encoding="utf-8") as file:
            file.write(text)

    def _file(self, trial_id: str) -> Path:
        return self._folder / f"{trial_id}.jsonl"
