"""Something that is done again and again beside the work, until the work has ended."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def regularly(act: Callable[[], object], every_s: float, name: str) -> Iterator[None]:
    """Call `act` every `every_s` seconds in a thread of that name, which has ended when the block has.

    An error of the file system, such as of a share that is away for a while, is passed over: the next call may succeed.
    """
    ending = threading.Event()

    def run() -> None:
        while not ending.wait(every_s):
            with contextlib.suppress(OSError):
                act()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join()
