"""What training says while it runs, and what it leaves beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

Report = Callable[[Mapping[str, float], int], None]
"""Takes metrics and the optimizer step of the trial that they belong to."""


@dataclass
class Trained:
    """What a stage's training leaves beside the weights."""

    steps: int = 0
    tokens: int = 0
    """Real tokens (no padding) of all workers."""
    images: int = 0
    """Images of all workers, each as often as it was seen."""
    seconds: float = 0.0
    """Wall seconds of training, without evaluations in between."""
    timed_steps: int = 0
    """Optimizer steps within `seconds`: all but those before a checkpoint that does not say what they took."""
    losses: list[float] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)
    resumed_from_step: int | None = None
    passes: str = ""
    """How forward and backward passes ran, such as "recorded"."""


class Costs:
    """What a trial has cost so far, beside what `Trained` counts; checkpoints store it. This class counts nothing."""

    def so_far(self) -> dict[str, Any]:
        """Seconds and peaks from the trial's first start on, as JSON-like data."""
        return {}

    def restore(self, earlier: dict[str, Any]) -> None:
        """Count from what `so_far` returned when the checkpoint was written; a later call replaces it."""

    def saving(self) -> AbstractContextManager[None]:
        """Enclose the writing of a checkpoint: its seconds do not count as training, which is compared."""
        return nullcontext()

    def trained_for(self, seconds: float) -> None:
        """Told of the stage's `Trained.seconds` as they grow."""

    def evaluated_for(self, seconds: float) -> None:
        """Told of the trial's share of an evaluation together with other trials."""

    def count(self, step: int, tokens: int) -> None:
        """Take how many tokens this stage was trained on up to a logged step of the trial."""

    def incomplete(self) -> None:
        """Note that a checkpoint does not say what the steps before it took."""
