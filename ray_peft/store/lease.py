"""Who writes to a URL: an object with owner and heartbeat, so that two drivers never write to one at a time."""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from dataclasses import asdict, dataclass

import psutil

from ray_peft.errors import SearchSpaceError, StorageError
from ray_peft.foundation.audience import Audience
from ray_peft.foundation.durations import short_time
from ray_peft.store.remote import Remote

FILE = ".ray_peft-driver.json"
BEAT_S = 15.0
SILENT_S = 60.0
"""A driver that changes nothing for so long is dead. It is measured here: clocks of two machines may differ."""
_LOOK_S = 3.0
_SETTLE_S = 2.0
"""Two drivers that take a dead one's place at the same time see each other after that."""


@dataclass
class Holder:
    """The driver that writes to a URL, as the object there says."""

    token: str
    host: str
    pid: int
    beat: int = 0
    at: float = 0.0
    """Unix time [s] of the last heartbeat, by its own clock."""

    def has_died_here(self) -> bool:
        """Whether it was a process of this machine that is gone."""
        return self.host == platform.node() and not psutil.pid_exists(self.pid)

    def text(self) -> str:
        """For a message."""
        age = short_time(max(0.0, time.time() - self.at))
        return f"process {self.pid} on {self.host}, heard of {age} ago by its own clock"


class Lease:
    """The right to write to a URL, for one driver."""

    def __init__(self, remote: Remote, console: Audience) -> None:
        self._remote, self._console = remote, console
        self._own = Holder(uuid.uuid4().hex, platform.node(), os.getpid())
        self.lost_to: Holder | None = None
        """Another driver that has taken the URL since; nothing more may be written then."""

    def take(self) -> None:
        """Become the one that writes; a driver that was killed is waited for until it has been silent for a minute.

        Raises:
            SearchSpaceError: another driver writes there.
            StorageError: the URL cannot be read or written.
        """
        holder = self._holder()
        if holder is None:
            if not self._remote.create(FILE, self._content()):
                raise self._refusal(self._holder())
            return
        if not holder.has_died_here():
            self._watch(holder)
        self._remote.put(self._content(), FILE)
        time.sleep(_SETTLE_S)
        if (holder := self._holder()) is None or holder.token != self._own.token:
            raise self._refusal(holder)

    def beat(self) -> None:
        """Say that this driver is alive, unless another one has taken its place.

        Raises:
            OSError: the URL is away for the moment.
        """
        try:
            holder = self._holder()
            if holder is not None and holder.token != self._own.token:
                self.lost_to = holder
            elif self.lost_to is None:
                self._own.beat += 1
                self._remote.put(self._content(), FILE)
        except StorageError as error:
            raise OSError(str(error)) from None

    def check(self) -> None:
        """Make sure that this driver may still write.

        Raises:
            StorageError: another one has taken the URL.
        """
        if self.lost_to is not None:
            raise StorageError(
                f"{self._remote.shown}: another ray-peft has taken it ({self.lost_to.text()}), so nothing more is sent "
                "there"
            )

    def give_back(self) -> None:
        """Let the next driver begin at once.

        Raises:
            StorageError: the URL cannot be written; the next one waits for a minute.
        """
        holder = self._holder()
        if holder is not None and holder.token == self._own.token:
            self._remote.remove(FILE)

    def _watch(self, holder: Holder) -> None:
        """Wait until a driver has been silent for long enough."""
        self._console.say(
            f"{self._remote.shown}: {holder.text()}, has not given it back; if it says nothing for {SILENT_S:g} s, it "
            "is taken for dead"
        )
        until = time.monotonic() + SILENT_S
        while time.monotonic() < until:
            time.sleep(_LOOK_S)
            now = self._holder()
            if now is None:
                return
            if (now.token, now.beat) != (holder.token, holder.beat):
                raise self._refusal(now)

    def _refusal(self, holder: Holder | None) -> SearchSpaceError:
        who = holder.text() if holder is not None else "it has just begun"
        return SearchSpaceError(
            f"--out {self._remote.shown}: another ray-peft is writing there ({who}); wait for it, or give another --out"
        )

    def _content(self) -> bytes:
        self._own.at = time.time()
        return json.dumps(asdict(self._own)).encode()

    def _holder(self) -> Holder | None:
        content = self._remote.read(FILE)
        try:
            return None if content is None else Holder(**json.loads(content))
        except (ValueError, TypeError):
            raise StorageError(
                f"{self._remote.shown}/{FILE}: says nothing that this version understands; remove it if no sweep runs"
            ) from None
