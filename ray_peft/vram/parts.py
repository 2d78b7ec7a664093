"""The parts of a trial that run on shapes, by name: an error names the part in which it was raised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

ATTACH, STEP, SCORING, ANSWERING = "attaching the method", "a training step", "scoring a row", "decoding an answer"
"""What a trial does, in this order."""


@contextlib.contextmanager
def during(part: str) -> Iterator[None]:
    """Add the part's name to an error that is raised inside."""
    try:
        yield
    except Exception as error:
        error.add_note(part)
        raise


def part_of(error: BaseException) -> str | None:
    """The part of a trial in which an error was raised; None if it was in none of them."""
    notes = [note for note in getattr(error, "__notes__", []) if note in (ATTACH, STEP, SCORING, ANSWERING)]
    return notes[0] if notes else None
