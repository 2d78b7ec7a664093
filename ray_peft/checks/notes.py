"""Notes on trials: each kept once for the report, and the first of them on the console."""

from __future__ import annotations

from ray_peft.foundation.audience import Audience

SHOWN = 40
"""Notes on the console; a space of a thousand trials may have one of its own for each."""
LONGEST = 1_200
"""Characters of a note on the console."""


class Notes:
    """What a reader of a comparison must know, in the order in which it came up."""

    def __init__(self, console: Audience) -> None:
        self._console = console
        self._notes: dict[str, None] = {}

    def add(self, note: str) -> None:
        """Keep a note, and show it unless it was shown or there were many."""
        if note in self._notes:
            return
        self._notes[note] = None
        if len(self._notes) <= SHOWN:
            more = f"... ({len(note):,} characters)"
            self._console.say(note if len(note) <= LONGEST else note[: LONGEST - len(more)] + more)

    def close(self) -> list[str]:
        """All notes; how many were not shown is said."""
        if len(self._notes) > SHOWN:
            self._console.say(f"{len(self._notes) - SHOWN:,} more notes of these kinds; a sweep's report has them all")
        return list(self._notes)
