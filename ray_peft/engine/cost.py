"""What a trial has cost up to a checkpoint. The checkpoint stores it, so that a resumed trial reports all its costs."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray_peft.engine.trained import Costs, Trained
from ray_peft.foundation.whole import write_text

logger = logging.getLogger(__name__)

COST_FILE = "cost.json"
"""The costs in a checkpoint of several files, as SFTTrainer writes them."""


def plain(trained: Trained, costs: Costs) -> dict[str, Any]:
    """What a stage and its trial have cost so far, as JSON-like data."""
    return {"trained": asdict(trained), "trial": costs.so_far()}


def restore(saved: dict[str, Any] | None, trained: Trained, costs: Costs, where: Path) -> None:
    """Go on counting from a checkpoint's numbers.

    Args:
        saved: what `plain` returned. None is for a checkpoint of version 0.1.0, which has no costs: a warning is
            logged, and the costs are marked as incomplete.
        trained: the stage's counts, which are overwritten.
        costs: the trial's costs, which are overwritten.
        where: the checkpoint, for the log.
    """
    if saved is None:
        logger.warning("%s does not say what the steps before it took: seconds and tokens are of those after", where)
        costs.incomplete()
        return
    for name, value in saved["trained"].items():
        setattr(trained, name, value)
    costs.restore(saved["trial"])


def write(folder: Path, cost: dict[str, Any]) -> None:
    """Add the numbers to a checkpoint that is whole without them."""
    write_text(folder / COST_FILE, json.dumps(cost))


def read(folder: Path) -> dict[str, Any] | None:
    """The numbers of a checkpoint; None where it has none."""
    path = folder / COST_FILE
    if not path.is_file():
        return None
    cost: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return cost
