"""Values of the command line that several commands take."""

from __future__ import annotations

import argparse
import math


def steps(text: str) -> tuple[int, ...]:
    """Steps from a comma-separated list."""
    return tuple(count(part.strip()) for part in text.split(","))


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0 (found {text!r})")
    return number


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number above 0 (found {text!r})")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    """Names from a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def add_trust(command: argparse.ArgumentParser) -> None:
    """Add --trust-remote-code to a command that loads the model of an MLflow run."""
    command.add_argument(
        "--trust-remote-code", action="store_true",
        help="run Python code that the MLflow run's model or benchmarks bring; such a run is refused without it",
    )  # fmt: skip
