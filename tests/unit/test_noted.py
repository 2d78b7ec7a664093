"""Notes on trials: each once, all kept, and no flood on the console."""

from ray_peft.checks.notes import LONGEST, SHOWN, Notes
from ray_peft.console import Console


def test_each_note_is_shown_and_kept_once(capsys):
    notes = Notes(Console())
    for text in ("data: one", "caution: two", "data: one"):
        notes.add(text)
    assert notes.close() == ["data: one", "caution: two"]
    assert capsys.readouterr().out.splitlines() == ["data: one", "caution: two"]


def test_many_and_long_notes_are_kept_whole_and_shown_in_part(capsys):
    notes = Notes(Console())
    long = "data: " + "x" * 2_000_000
    for text in [long, *(f"caution: trial {number} of its own" for number in range(3000))]:
        notes.add(text)
    kept = notes.close()
    assert (kept[0], len(kept)) == (long, 3001)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == SHOWN + 1
    assert len(lines[0]) == LONGEST
    assert lines[0].endswith("... (2,000,006 characters)")
    assert lines[-1] == f"{3001 - SHOWN:,} more notes of these kinds; a sweep's report has them all"
