"""Whether this process was told to stop: training then ends at its next step, with a checkpoint."""

from __future__ import annotations

import threading

_stop = threading.Event()
"""Of the process, as a signal would be: whoever tells it does not know what is trained here."""


class Stopped(BaseException):
    """Training ended at a step because its process was told to stop. Not an Exception: the trial has not failed."""


def tell() -> None:
    """End what is trained in this process at its next step."""
    _stop.set()


def forget() -> None:
    """Train again."""
    _stop.clear()


def is_told() -> bool:
    """True after `tell`."""
    return _stop.is_set()
