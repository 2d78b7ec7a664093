"""Requests to the driver of a running sweep: files in a folder that its user alone may open, and no network port."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray_peft.errors import DataError, RayPeftError
from ray_peft.foundation.storage import writing
from ray_peft.foundation.whole import write_text
from ray_peft.store.progress import DRIVEN, Reader

FOLDER = "control"
POLL_S = 0.1
PATIENCE_S = 120.0
"""How long an answer is waited for: the checks of a new trial take seconds, and a model's first ones a minute."""


@dataclass(frozen=True)
class Answer:
    """What a driver says of a request."""

    text: str
    accepted: bool = True
    trials: tuple[str, ...] = ()
    """Ids of the trials that it is about."""


def open_channel(folder: Path) -> None:
    """Prepare a sweep's folder for requests; those of an earlier run go. Where that is impossible, none is taken."""
    control = folder / FOLDER
    with contextlib.suppress(OSError):
        control.mkdir(mode=0o700, exist_ok=True)
        if _own(control):
            control.chmod(0o700)
            for path in control.iterdir():
                path.unlink()


def _own(control: Path) -> bool:
    """Whether the folder belongs to this process's user: nobody else's requests are taken."""
    return not control.is_symlink() and (os.name == "nt" or control.stat().st_uid == os.geteuid())


def serve(folder: Path, answer: Callable[[dict[str, Any]], Answer]) -> None:
    """Answer the requests that wait, in their order. A request that is none of ours is removed without an answer."""
    control = folder / FOLDER
    for path in sorted(control.glob("*.request")) if control.is_dir() and _own(control) else ():
        try:
            request = json.loads(path.read_text(encoding="utf-8"))
            path.unlink()
        except (OSError, ValueError):
            with contextlib.suppress(OSError):
                path.unlink()
            continue
        try:
            reply = answer(request)
        except RayPeftError as error:
            reply = Answer(str(error), accepted=False)
        except Exception as error:  # a request must not end the sweep
            reply = Answer(f"{type(error).__name__}: {error}", accepted=False)
        with contextlib.suppress(OSError):
            write_text(path.with_suffix(".answer"), json.dumps(asdict(reply)))


def ask(folder: Path, action: str, arguments: Mapping[str, Any]) -> Answer:
    """Ask the driver of a running sweep for something, and wait for its answer.

    Args:
        folder: the sweep's.
        action: such as "pause".
        arguments: of the action, as JSON-like data.

    Raises:
        DataError: the folder holds no sweep, it does not run, or the driver refuses; the text is the driver's.
        StorageError: this user may not write there.
    """
    reader = Reader(folder)
    if reader.driver() not in DRIVEN:
        raise DataError(f"{folder}: the sweep does not run; the command that started it runs what is missing")
    path = folder / FOLDER / f"{time.time_ns()}-{uuid.uuid4().hex}.request"
    with writing(path, f"{action} it as the user that runs the sweep"):
        write_text(path, json.dumps({"action": action, **arguments}))
    for _ in _looks():
        with contextlib.suppress(OSError, ValueError):
            reply = path.with_suffix(".answer")
            plain = json.loads(reply.read_text(encoding="utf-8"))
            reply.unlink()
            answer = Answer(**plain | {"trials": tuple(plain["trials"])})
            if not answer.accepted:
                raise DataError(answer.text)
            return answer
        if reader.driver() not in DRIVEN:
            raise DataError(f"{folder}: the sweep ended before it could {action}")
    with contextlib.suppress(OSError):
        path.unlink()
    raise DataError(f"{folder}: the sweep has not answered for {PATIENCE_S:.0f} s; see: ray-peft ctl {folder} list")


def _looks() -> Iterator[None]:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        yield
        time.sleep(POLL_S)
