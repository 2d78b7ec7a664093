"""The caller's answers to signals: Ray and Tune put their own in their place, and leave them there."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

TAKEN = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK")
"""The signals that Ray 2.60, its Tune and its Train answer, by name: not every system has all."""


@contextlib.contextmanager
def callers_signals() -> Iterator[None]:
    """Put the answers that this process had back at the end, ignored signals among them.

    Outside the main thread nothing can be set, by Ray neither.
    """
    before = {number: signal.getsignal(number) for number in _numbers()}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # None: set by C code, which Python cannot put back
                    signal.signal(number, handler)


def _numbers() -> list[signal.Signals]:
    return [number for name in TAKEN if isinstance(number := getattr(signal, name, None), signal.Signals)]
