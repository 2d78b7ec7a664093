"""Trials whose results the tracking store lacks: a thread of the driver sends them when the store is back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from ray_peft.errors import TrackingError, first_line
from ray_peft.foundation.audience import Audience
from ray_peft.store import tracking
from ray_peft.store.tracking import AwayError, Store

EVERY_S = 5.0
"""Between two attempts; each that fails makes the pause longer."""
LONGEST_S = 30.0


class Unsent:
    """What a sweep still has for its store. Trials go on meanwhile."""

    def __init__(
        self, store: Store, folder_of: Callable[[str], Path], parent_run_id: str | None, console: Audience
    ) -> None:
        """`folder_of` gives a trial's folder by its id."""
        self._store, self._folder_of, self._parent, self._console = store, folder_of, parent_run_id, console
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._sender: threading.Thread | None = None
        self.away = False
        """True if the store did not answer at the last attempt."""

    def add(self, trial_id: str, reason: str) -> None:
        """Go on trying to send what a trial has."""
        with self._lock:
            first = not self._reasons
            self._reasons[trial_id] = reason
        if first:
            self._console.say(
                f"caution: the tracking store does not take {trial_id}: {first_line(reason)}. Trials go on; what the "
                "store lacks is kept beside them, and sent when it is back"
            )
        if self._sender is None:
            self._sender = threading.Thread(target=self._send_often, name="unsent", daemon=True)
            self._sender.start()

    def close(self, patience_s: float) -> dict[str, str]:
        """Stop, after one more attempt; what the store still lacks, by trial, with the reason.

        Args:
            patience_s: how long a store that is away is waited for.
        """
        self._closing.set()
        if self._sender is not None:
            self._sender.join(timeout=patience_s)
        if self._sender is not None and self._sender.is_alive():  # it waits for an answer, and so would the next call
            self.away = True
        else:
            self._send_all(patience_s)
        with self._lock:
            return dict(self._reasons)

    def _send_often(self) -> None:
        pause = EVERY_S
        while not self._closing.wait(pause):
            with self._lock:
                empty = not self._reasons
            pause = EVERY_S if empty or self._send_all(0.0) else min(2 * pause, LONGEST_S)

    def _send_all(self, patience_s: float) -> bool:
        """One attempt for each; false if the store did not take one. A store that is away is asked once."""
        with self._lock:
            waiting = list(self._reasons)
        self.away = False
        for trial_id in waiting:
            try:
                tracking.send(self._store, self._folder_of(trial_id), patience_s=patience_s, parent_run_id=self._parent)
            except TrackingError as error:
                self.away = isinstance(error, AwayError)
                with self._lock:
                    self._reasons[trial_id] = str(error)
                if self.away:  # it may take a minute each time to keep silent
                    break
                patience_s = 0.0
                continue
            with self._lock:
                del self._reasons[trial_id]
            self._console.say(f"the tracking store has {trial_id} now")
        with self._lock:
            return not self._reasons
