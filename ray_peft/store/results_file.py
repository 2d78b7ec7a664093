"""The rows of a sweep, as its folder's results.jsonl holds them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ray_peft.errors import DataError
from ray_peft.foundation.json_lines import read_lines
from ray_peft.trial.result import TrialResult


def read_results(folder: Path) -> list[TrialResult]:
    """The results of a sweep, each trial once: a later line of the same trial replaces an earlier one.

    A broken last line, as a killed process leaves it, is passed over with a warning.

    Raises:
        DataError: there is no results.jsonl, or another line is broken, or a line is not a result.
    """
    path = Path(folder) / "results.jsonl"
    if not path.exists():
        raise DataError(f"{path}: no such file; give the folder that a sweep wrote (its --out)")
    return latest(read_lines(path, TrialResult))


def latest(results: Iterable[TrialResult]) -> list[TrialResult]:
    """Each trial once, at its first place with its last value."""
    return list({result.trial_id: result for result in results}.values())
