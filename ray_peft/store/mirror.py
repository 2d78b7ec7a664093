"""A sweep's folder of this machine and its copy at a URL: fetched at a start, sent as results come.

The order of sending makes what is there usable after a kill at any moment: a trial's files come before its checkpoints,
those before its row, and rows before the list of them. Losses and the outbox are read after the checkpoint was seen, so
they hold its steps. What this machine last saw of each file at the URL stands in a file of the folder, so a later start
knows which side has changed.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from ray_peft.errors import StorageError
from ray_peft.foundation.json_lines import drop_torn_line, read_lines
from ray_peft.foundation.storage import error_line, writing
from ray_peft.foundation.strict import Strict
from ray_peft.foundation.whole import write_text
from ray_peft.store import outbox, requests
from ray_peft.store.progress import DRIVER_FILE
from ray_peft.store.remote import Remote
from ray_peft.trial.live import CANCEL_FILE, LIVE_FILE, STOP_FILE
from ray_peft.trial.result import RESULT_FILE

STATE_FILE = ".mirror.jsonl"
_FOLDERS = {"ray", requests.FOLDER}
"""Of this machine alone; at any depth, since a comparison holds sweeps."""
_FILES = {DRIVER_FILE, LIVE_FILE, CANCEL_FILE, STOP_FILE}
"""What processes of a running sweep say to each other."""
_READ_WHOLE = 32 * 2**20
"""Bytes up to which a file is read before it is sent, so that one which grows meanwhile is sent as it was."""
WAY_OUT = "free some space, or set RAY_PEFT_OUTPUTS to another folder"


class Seen(Strict):
    """What this machine knows of one file that it shares with the URL; the last line of a path counts."""

    path: str
    size: int = 0
    """Bytes here when it was last equal there, or, while it is being sent, of what is sent."""
    mtime_ns: int = 0
    version: str | None = None
    """There; None if it was not there."""
    sending: bool = False
    """True from before a file is sent until its new version is known."""
    gone: bool = False

    def is_own(self, version: str) -> bool:
        """Whether nobody else has written the version that is there."""
        return version == self.version or (self.sending and version.startswith(f"{self.size}:"))


class Mirror:
    """A folder and its copy."""

    def __init__(self, remote: Remote, folder: Path, allowed: Callable[[], object] = lambda: None) -> None:
        """`allowed` raises where nothing may be written to the URL any more."""
        self._remote, self._folder, self._allowed = remote, folder, allowed
        self._state = folder / STATE_FILE
        self._writing = threading.Lock()
        self._known: dict[str, Seen] = {}

    def fetch(self) -> int:
        """Bring what the URL has and this folder lacks, or has older; returns how many files came.

        What has changed here since it was last sent stays, unless another machine has written it, too. What another
        machine has removed there is removed here, unless it has changed here.

        Raises:
            StorageError: the URL cannot be read, or the folder cannot be written.
        """
        self._recall()
        there, here = self._remote.versions(), self._files()
        newer_there = [
            path
            for path, version in there.items()
            if _is_shared(path)
            and not (path in here and (known := self._known.get(path)) is not None and known.is_own(version))
        ]
        with ThreadPoolExecutor(self._remote.at_once) as pool:
            list(pool.map(lambda path: self._get(path, there[path]), newer_there))
        for path, known in list(self._known.items()):
            if path not in there and not known.sending:
                if here.get(path) == (known.size, known.mtime_ns):
                    (self._folder / path).unlink(missing_ok=True)
                self._note(Seen(path=path, gone=True))
        return len(newer_there)

    def send(self) -> int:
        """Make the URL as this folder is; returns how many files were sent or removed.

        Raises:
            StorageError: the URL cannot be written, or this folder is gone.
        """
        if not self._state.is_file():  # an unmounted folder looks like one whose files were removed
            raise StorageError(f"{self._folder}: is gone, or was emptied, while a sweep used it; nothing more is sent")
        here = self._files()
        changed = [path for path, stat in here.items() if not self._is_sent(path, stat)]
        # Read first and sent last: what it says was taken out of the outbox stands in the outbox by then.
        offsets = {path: self._content(path) for path in changed if PurePosixPath(path).name == outbox.SENT_FILE}
        sent = 0
        for rank in range(_LAST_RANK + 1):
            paths = [path for path in changed if _rank(path) == rank]
            with ThreadPoolExecutor(self._remote.at_once) as pool:
                sent += sum(pool.map(lambda path: self._put(path, here[path], offsets.get(path)), paths))
        removed_here = [path for path in self._known if path not in here and not (self._folder / path).exists()]
        for path in removed_here:
            self._allowed()
            self._remote.remove(path)
            self._note(Seen(path=path, gone=True))
        return sent + len(removed_here)

    def _is_sent(self, path: str, stat: tuple[int, int]) -> bool:
        known = self._known.get(path)
        return known is not None and not known.sending and (known.size, known.mtime_ns) == stat

    def _get(self, path: str, version: str) -> None:
        target = self._folder / path
        self._remote.get(path, target)
        stat = target.stat()
        self._note(Seen(path=path, size=stat.st_size, mtime_ns=stat.st_mtime_ns, version=version))

    def _put(self, path: str, stat: tuple[int, int], content: bytes | None) -> bool:
        """Send a file, or what was read of it before; false if it has gone meanwhile, as an older checkpoint does."""
        self._allowed()
        source = self._folder / path
        earlier = self._known.get(path)
        if content is None and stat[0] <= _READ_WHOLE:
            content = self._content(path)
            if content is None:
                return False
        size = stat[0] if content is None else len(content)
        before = earlier.version if earlier is not None else None
        self._note(Seen(path=path, size=size, mtime_ns=stat[1], version=before, sending=True))
        try:
            version = self._remote.put(source if content is None else content, path)
        except StorageError:
            if source.exists():
                raise
            return False
        self._note(Seen(path=path, size=stat[0], mtime_ns=stat[1], version=version))
        return True

    def _content(self, path: str) -> bytes | None:
        try:
            return (self._folder / path).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(error_line(error, self._folder / path)) from None

    def _files(self) -> dict[str, tuple[int, int]]:
        """The files here that belong at the URL, with size and time of change."""

        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):  # as of an older checkpoint, which goes meanwhile
                raise StorageError(error_line(error)) from None

        files = {}
        for folder, folders, names in os.walk(self._folder, onerror=refuse):
            folders[:] = [name for name in folders if _is_shared(name)]
            for name in names:
                file = Path(folder, name)
                path = file.relative_to(self._folder).as_posix()
                if _is_shared(path):
                    try:
                        stat = file.stat()
                    except FileNotFoundError:
                        continue
                    files[path] = (stat.st_size, stat.st_mtime_ns)
        return files

    def _recall(self) -> None:
        """Read what this machine knew, and write it anew without what is out of date."""
        with writing(self._state, WAY_OUT):
            self._folder.mkdir(parents=True, exist_ok=True)
            drop_torn_line(self._state)
            self._known = {}
            for file in read_lines(self._state, Seen):
                self._known[file.path] = file
            self._known = {path: file for path, file in self._known.items() if not file.gone}
            write_text(self._state, "".join(map(_line, self._known.values())))

    def _note(self, known: Seen) -> None:
        with self._writing, writing(self._state, WAY_OUT), self._state.open("a", encoding="utf-8") as file:
            file.write(_line(known))
            if known.gone:
                self._known.pop(known.path, None)
            else:
                self._known[known.path] = known


def _line(known: Seen) -> str:
    return json.dumps(known.model_dump(exclude_defaults=True)) + "\n"


def _is_shared(path: str) -> bool:
    """Whether a file of a sweep's folder, or one in folders of sweeps below it, belongs at the URL."""
    parts = PurePosixPath(path).parts
    return parts[-1] not in _FILES and not any(part.startswith(".") or part in _FOLDERS for part in parts)


_LAST_RANK = 4


def _rank(path: str) -> int:
    """When a file is sent: after those that it presupposes."""
    parts = PurePosixPath(path).parts
    if "trials" not in parts:
        return 4
    if parts[-1] == RESULT_FILE:
        return 3
    if any(part.startswith("checkpoint-") for part in parts):
        return 2
    return 1 if parts[-1] == outbox.SENT_FILE else 0
