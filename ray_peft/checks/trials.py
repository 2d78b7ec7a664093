"""The checks of trials before anything starts, and the ids of their content."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ray_peft.checks.inspector import Inspector
from ray_peft.checks.notes import Notes
from ray_peft.checks.rehearsal import rehearse
from ray_peft.foundation.audience import Audience
from ray_peft.spec import TrialSpec


@dataclass(frozen=True)
class Checked:
    """Trials that may start."""

    trials: list[TrialSpec]
    """Under the ids of their content, each once."""
    notes: list[str]
    """What to know about their data and settings."""


def inspect_trials(trials: Iterable[TrialSpec], console: Audience, inspector: Inspector | None = None) -> Checked:
    """Check model, tokenizer and data of every trial once, prepare the data, and settle which trial each is.

    Args:
        trials: an ensemble after its members, or alone.
        console: where notes are written: rows that were cut, left out or unusable, settings known to go wrong.
        inspector: remembers models and data, for trials that are proposed later; None uses one for this call.

    Raises:
        DataError, ModelError: something is missing or malformed, or a method fails on its model.
        SpecError: a method's stage would be left without a step, or two members of an ensemble are the same.
    """
    inspector = inspector or Inspector()
    settled: dict[str, TrialSpec] = {}
    notes = Notes(console)
    same = 0
    for trial in trials:
        inspection = inspector.inspect(trial)
        messages = [note if note.startswith("caution: ") else f"data: {note}" for note in inspection.notes]
        messages += [f"method: {note}" for note in inspection.method_notes]
        for note in messages + [f"caution: {note}" for note in trial.cautions()]:
            notes.add(note)
        settled_trial = inspector.settled(trial)
        same += settled_trial.trial_id in settled
        settled.setdefault(settled_trial.trial_id, settled_trial)
    if same:
        console.say(
            f"{same} of {same + len(settled)} trials run once with others: they differ only in what changes no result"
        )
    checked = list(settled.values())
    for note in rehearse(checked):
        notes.add(f"caution: {note}")
    return Checked(checked, notes.close())
