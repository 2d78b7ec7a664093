"""The caller's signal handlers: Ray and Tune replace them with their own, and do not restore them."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")
"""Ctrl-C; `kill` and `ray job stop`; a terminal that is closed."""
SAME_S = 0.5
"""Signals this close to the first are the same wish: a shell or make may pass it on once more."""

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


@contextlib.contextmanager
def stopping(end_now: Callable[[], None]) -> Iterator[None]:
    """Answer the signals that ask a process to stop: the first with KeyboardInterrupt, a second one with `end_now`.

    One that is ignored stays ignored, as `nohup` and shell scripts want it. Outside the main thread nothing is set.
    """
    first: list[float] = []

    def answer(_number: int, _frame: FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            raise KeyboardInterrupt
        if time.monotonic() - first[0] > SAME_S:
            end_now()

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in STOPPING:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, answer)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def _numbers() -> list[signal.Signals]:
    return [number for name in TAKEN if isinstance(number := getattr(signal, name, None), signal.Signals)]
