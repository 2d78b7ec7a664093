"""A metric of one's own: a Python function of an answer and its reference, named by its import path."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from ray_peft.errors import SpecError

KEY = "evaluation.metrics"

OwnMetric: TypeAlias = Callable[[str, str], float]
"""From an answer and its reference to a number, the higher the better."""


def name_of(path: str) -> str:
    """What the metric of an import path is called in scores: the function's name."""
    return path.partition(":")[2]


def load(path: str) -> OwnMetric:
    """The function of an import path such as `my_package.scores:has_a_number`.

    Raises:
        SpecError: there is no such module or function here.
    """
    module, _, name = path.partition(":")
    try:
        metric = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may raise whatever it likes while it is imported
        raise SpecError(
            f"{KEY}: {path}: cannot be imported: {type(error).__name__}: {error}; give MODULE:FUNCTION of a module on "
            "PYTHONPATH, on every machine that runs trials"
        ) from None
    if not callable(metric):
        raise SpecError(f"{KEY}: {path}: is a {type(metric).__name__}, not a function of an answer and a reference")
    own: OwnMetric = metric
    return own


def rows(path: str, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """The metric of every row.

    Raises:
        SpecError: it cannot be imported, raises, or gives anything but a finite number; the message names the row.
    """
    metric = load(path)
    values = []
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        try:
            value = float(metric(prediction, reference))
        except Exception as error:
            raise SpecError(f"{KEY}: {path}: row {row}: {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise SpecError(f"{KEY}: {path}: row {row}: gives {value}, but a score must be a finite number")
        values.append(value)
    return values
