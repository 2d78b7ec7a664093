"""Where a sweep works: a folder of this machine, which is kept equal to a URL where --out is one."""

from __future__ import annotations

import contextlib
import hashlib
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from ray_peft.errors import ReportLost, StorageError
from ray_peft.foundation.audience import Audience
from ray_peft.foundation.masking import mask_address
from ray_peft.foundation.regularly import regularly
from ray_peft.store.lease import BEAT_S, Lease
from ray_peft.store.ledger import Ledger
from ray_peft.store.mirror import Mirror
from ray_peft.store.remote import Remote, is_url

SEND_S = 10.0
"""Between two looks for what is to be sent."""


def folder_of(url: str, outputs: Path) -> Path:
    """The folder of this machine that stands for a URL.

    Args:
        url: with or without a password, which the folder's name does not show.
        outputs: the folder of all results.
    """
    if url.lower().startswith("file://"):
        return Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
    shown = mask_address(url).rstrip("/")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", shown).strip("-.")[:80]
    return outputs / f"{name}-{hashlib.sha256(shown.encode()).hexdigest()[:8]}"


def is_remote(place: str | Path | None) -> bool:
    """Whether results go to a URL that is no folder of this machine."""
    return isinstance(place, str) and is_url(place) and not place.lower().startswith("file://")


@contextlib.contextmanager
def working_folder(place: str | Path, outputs: Path, console: Audience) -> Iterator[Path]:
    """The folder that a sweep works in. Of a URL: it holds what is there, and what it gets is sent there as it comes.

    Args:
        place: a folder, or a URL of any file system that fsspec knows.
        outputs: the folder of all results, which holds the one that stands for a URL.
        console: is told what a user would wonder about.

    Raises:
        SearchSpaceError: another driver writes to the URL.
        StorageError: the URL cannot be read or written, and nothing was started.
        ReportLost: something could not be sent in the end; the same call sends it.
    """
    if not is_remote(place):
        yield folder_of(str(place), outputs) if is_url(str(place)) else Path(place)
        return
    remote = Remote(str(place))
    remote.check()
    folder = folder_of(str(place), outputs).absolute()
    with contextlib.ExitStack() as until_ended:
        with Ledger(folder).locked():
            lease = Lease(remote, console)
            lease.take()
            until_ended.callback(_given_back, lease)
            mirror = Mirror(remote, folder, lease.check)
            if fetched := mirror.fetch():
                console.say(f"{remote.shown}: {fetched} files fetched into {folder}")
        sender = _Sender(mirror, remote, console)
        try:
            with regularly(lease.beat, BEAT_S, "lease"), regularly(sender.send, SEND_S, "mirror"):
                yield folder
        except BaseException:
            sender.send()
            raise
        try:
            mirror.send()
        except StorageError as error:
            raise ReportLost(f"{error}. All of it is in {folder}, and the same command sends it") from None
    console.say(f"all of it is at {remote.shown}")


def fetched_folder(place: str, outputs: Path) -> Path:
    """The folder of this machine that stands for a URL, with what is there now; nothing is sent.

    Raises:
        SearchSpaceError: a sweep of this machine is using it.
        StorageError: the URL cannot be read.
    """
    folder = folder_of(place, outputs).absolute()
    if is_remote(place):
        remote = Remote(place)
        remote.check()
        if not remote.versions():
            raise StorageError(f"{remote.shown}: there is nothing")
        with Ledger(folder).locked():
            Mirror(remote, folder).fetch()
    return folder


class _Sender:
    """Sends while a sweep runs; an outage is said once, and ends by itself."""

    def __init__(self, mirror: Mirror, remote: Remote, console: Audience) -> None:
        self._mirror, self._remote, self._console = mirror, remote, console
        self._away = False

    def send(self) -> None:
        """Send what has changed, or say why it cannot be."""
        try:
            self._mirror.send()
        except StorageError as error:
            if not self._away:
                self._console.say(f"caution: {error}; what cannot be sent waits in the sweep's folder")
            self._away = True
            return
        if self._away:
            self._console.say(f"{self._remote.shown}: can be written again, and has what waited")
        self._away = False


def _given_back(lease: Lease) -> None:
    with contextlib.suppress(StorageError):
        lease.give_back()
