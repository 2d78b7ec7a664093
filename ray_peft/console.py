"""What a person sees while a sweep runs: one line per event, and one progress line on a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ray_peft.errors import StorageError

INTERRUPTED = 130
"""Exit code: the user stopped it."""
UNSENT = 3
"""Exit code: all trials finished, but the tracking store lacks some of what they gave."""


def prepare_streams() -> None:
    """Let standard output and error take every character, and open them if a shell's `>&-` has closed them."""
    if sys.stdout is None or sys.stderr is None:
        # Else the next file that is opened would get their numbers, and what libraries print.
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(number)
        sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the process's life
        sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def abandon_output() -> None:
    """Discard further output: nobody reads it, and Python would raise an error at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def print_text(text: str = "", *, flush: bool = False) -> None:
    """Print text to standard output.

    Raises:
        BrokenPipeError: nobody reads it any more.
        StorageError: it cannot be written.
    """
    try:
        print(text, end="\n" if text else "", flush=flush)
    except BrokenPipeError:
        raise
    except OSError as error:
        abandon_output()
        raise StorageError(f"cannot write to standard output: {error.strerror}") from None


def short_path(path: Path) -> str:
    """The path from here if it lies below, else whole."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


class Console:
    """Writes plain lines; never fails on a character that the console's encoding lacks, nor where nobody reads."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._progress_width = 0

    @property
    def _stream(self) -> TextIO:
        """Looked up on each use: Tune pickles what its callbacks hold, and a stream cannot be pickled."""
        return sys.stdout

    def say(self, text: str) -> None:
        """Write whole lines."""
        if self._quiet:
            return
        with self._fallible():
            self._clear()
            print(self._safe(text), file=self._stream, flush=True)

    def progress(self, text: str) -> None:
        """Show a passing state on a terminal; nothing elsewhere."""
        if self._quiet or not self._stream.isatty():
            return
        text = self._safe(text)[:110]
        with self._fallible():
            self._stream.write("\r" + text + " " * max(0, self._progress_width - len(text)))
            self._stream.flush()
            self._progress_width = len(text)

    @contextlib.contextmanager
    def _fallible(self) -> Iterator[None]:
        """Be quiet from now on where output ends, as in `ray-peft sweep FILE | head`: the trials go on."""
        try:
            yield
        except BrokenPipeError:
            self._quiet = True
            abandon_output()
        except OSError:  # a full disk, which the command line tells at the end
            self._quiet = True

    def _clear(self) -> None:
        if self._progress_width:
            self._stream.write("\r" + " " * self._progress_width + "\r")
            self._progress_width = 0

    def _safe(self, text: str) -> str:
        encoding = self._stream.encoding or "ascii"
        return text.encode(encoding, "backslashreplace").decode(encoding)
