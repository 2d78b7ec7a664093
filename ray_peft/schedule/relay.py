"""What trials of one process report, on its way to the Tune trial of each: a file of lines for each trial."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray_peft.foundation.json_lines import added_lines

POLL_S = 0.2
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
