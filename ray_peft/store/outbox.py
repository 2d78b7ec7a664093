"""What a trial sends to its tracking store, in a file in its folder: it survives the worker, the driver and an outage.

Every line of `outbox.jsonl` is one thing to store, in order. How far a store has taken them stands in
`outbox.sent.json`, so whoever goes on sending (the trial's worker, the driver, a later start, `ray-peft sync`) goes on
from there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ray_peft.foundation.json_lines import drop_torn_line
from ray_peft.foundation.locks import locked
from ray_peft.foundation.measured import to_json
from ray_peft.foundation.storage import error_line
from ray_peft.foundation.whole import write_text

logger = logging.getLogger(__name__)

FILE = "outbox.jsonl"
SENT_FILE = "outbox.sent.json"

Entry = dict[str, Any]
"""One thing to store, by its `do`: start, params, text, table, artifact, metrics, result or close."""


@dataclass
class Sent:
    """How much of an outbox a store has taken."""

    store: str = ""
    """The store, without credentials: another one gets everything."""
    offset: int = 0
    """Bytes of `outbox.jsonl`."""
    run_id: str | None = None
    """The run of the last start that was sent."""
    creating: str | None = None
    """The token of a run that may have been created without an answer."""
    closed: bool = False
    """True if the run was ended."""
    tables: list[dict[str, str]] = field(default_factory=list)
    """The run's tables, as MLflow lists them."""


class Outbox:
    """The outbox in one trial's folder. One process appends at a time; another may send."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / FILE
        self._unwritten: list[bytes] = []
        self._lock = threading.Lock()
        self._cut = False

    @property
    def exists(self) -> bool:
        """True if the trial has ever put an entry there."""
        return self._file.is_file()

    def put(self, *entries: Entry) -> bool:
        """Append entries. False, after a warning, if the disk refuses: they wait in memory for the next call."""
        with self._lock:
            warned_before = bool(self._unwritten)
            self._unwritten += [(json.dumps(to_json(entry), ensure_ascii=False) + "\n").encode() for entry in entries]
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._cut_half_line()
                size = self._file.stat().st_size if self._file.exists() else 0
                try:
                    with self._file.open("ab") as file:
                        file.write(b"".join(self._unwritten))
                except OSError:
                    with contextlib.suppress(OSError):
                        os.truncate(self._file, size)  # a full disk takes half a line
                    raise
            except OSError as error:
                if not warned_before:
                    reason = error_line(error, self._file)
                    logger.warning("results for the tracking store wait in memory: %s", reason)
                return False
            self._unwritten.clear()
            return True

    def _cut_half_line(self) -> None:
        """Cut off what a killed process may have left of a line, once."""
        if not self._cut:
            drop_torn_line(self._file)
            self._cut = True

    def after(self, offset: int) -> Iterator[tuple[Entry, int]]:
        """The whole entries behind `offset`, each with the offset behind it.

        A damaged one is passed over with a warning.
        """
        if not self._file.is_file():
            return
        with self._file.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                try:
                    entry = json.loads(line)
                    entry["do"]
                except (ValueError, TypeError, KeyError):
                    logger.warning("%s: what ends at byte %d is damaged, and is passed over", self._file, offset)
                    continue
                yield entry, offset

    def sent(self, store: str) -> Sent:
        """How much of it a store has taken; nothing, if the file speaks of another store or cannot be read."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            sent = Sent(**json.loads((self.folder / SENT_FILE).read_text(encoding="utf-8")))
            if sent.store == store:
                return sent
        return Sent(store)

    def note(self, sent: Sent) -> None:
        """Remember how much was taken.

        Raises:
            OSError: the disk refuses. What was sent is sent again then, which harms nothing.
        """
        write_text(self.folder / SENT_FILE, json.dumps(asdict(sent)))

    def waits(self, sent: Sent) -> bool:
        """True if there is something to send."""
        return bool(self._unwritten) or next(self.after(sent.offset), None) is not None

    @property
    def ended(self) -> bool:
        """True if the last entry says how the attempt ended: nothing follows it."""
        last = ""
        for entry, _ in self.after(0):
            last = entry["do"]
        return last in ("result", "close")

    @contextlib.contextmanager
    def sending(self, timeout_s: float) -> Iterator[None]:
        """Be the only one that sends from here.

        Raises:
            TimeoutError: another process sends, and goes on for longer than this.
            OSError: the folder cannot be written.
        """
        with locked(self.folder / ".outbox.lock", timeout_s):
            yield
