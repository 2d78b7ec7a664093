"""Rows with answers of known ROUGE-L, for tests of how rows are compared."""

from __future__ import annotations

from typing import Any

from ray_peft.metrics.scores import Scores
from ray_peft.report.material import Material
from ray_peft.spec import TrialSpec
from ray_peft.trial.result import TrialResult, Usage

REFERENCES = [f"the cat number {i} sat on the red mat today" for i in range(40)]
POOR = [f"the cat number {i} is here" for i in range(40)]
WORSE = ["dog" for _ in REFERENCES]
NEARLY = [POOR[0] + " x", *POOR[1:]]


def trial(
    method: str,
    *,
    seed: int = 42,
    status: Any = "finished",
    loss: float | None = None,
    memory: float | None = None,
    model: dict[str, Any] | None = None,
    **more: Any,
) -> TrialResult:
    """A result that took `memory` GiB and ten seconds of training for each of them."""
    spec = TrialSpec.from_plain(
        {
            "model": {"name": "org/tiny"} | (model or {}),
            "data": {"sources": [{"recipe": "alpaca", "path": "a.jsonl", "train": 90, "test": 10}]},
            "method": {"name": method},
            "train": {"steps": 10},
            "seed": seed,
        }
    )
    usage = Usage(peak_allocated_gib=memory, train_s=10.0 * (memory or 0))
    return TrialResult(
        trial_id=spec.trial_id, spec=spec, status=status, scores=Scores(eval_loss=loss), usage=usage, **more
    )


def material(pairs: list[tuple[TrialResult, list[str] | None]], references: list[str] = REFERENCES) -> Material:
    """Of (result, predictions) pairs; None answered nothing."""
    answers = {result.trial_id: (texts, references) for result, texts in pairs if texts is not None}
    return Material(title="t", results=[result for result, _ in pairs], answers=answers)
