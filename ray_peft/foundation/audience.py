"""Where messages go while trials run. The command line's console is one such place; the core knows none by name."""

from __future__ import annotations

from typing import Protocol


class Audience(Protocol):
    """Takes what people read."""

    def say(self, text: str) -> None:
        """Take whole lines."""

    def progress(self, text: str) -> None:
        """Take a passing state, which the next text replaces."""


class Silence:
    """Nobody."""

    def say(self, text: str) -> None:
        """Drop it."""

    def progress(self, text: str) -> None:
        """Drop it."""
