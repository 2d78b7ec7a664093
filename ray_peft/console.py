"""What a person sees while a sweep runs: one line per event, and one progress line on a terminal."""

from __future__ import annotations

import sys
from typing import TextIO


class Console:
    """Writes plain lines; never fails on a character that the console's encoding lacks."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._shown = 0

    @property
    def _stream(self) -> TextIO:
        """Looked up on each use: Tune pickles what its callbacks hold, and a stream cannot be pickled."""
        return sys.stdout

    def say(self, text: str) -> None:
        """Write whole lines."""
        if self._quiet:
            return
        self._clear()
        print(self._safe(text), file=self._stream, flush=True)

    def progress(self, text: str) -> None:
        """Show a passing state on a terminal; nothing elsewhere."""
        if self._quiet or not self._stream.isatty():
            return
        text = self._safe(text)[:110]
        self._stream.write("\r" + text + " " * max(0, self._shown - len(text)))
        self._stream.flush()
        self._shown = len(text)

    def _clear(self) -> None:
        if self._shown:
            self._stream.write("\r" + " " * self._shown + "\r")
            self._shown = 0

    def _safe(self, text: str) -> str:
        encoding = self._stream.encoding or "ascii"
        return text.encode(encoding, "backslashreplace").decode(encoding)


def bar(done: int, total: int, width: int = 20) -> str:
    """An ASCII progress bar such as `[#####...............]`."""
    filled = width if total <= 0 else min(width, width * done // total)
    return "[" + "#" * filled + "." * (width - filled) + "]"
