"""Distributions in a search space: where they stand, whether they are right, and what is drawn from them."""

from __future__ import annotations

import difflib
import random
from math import exp, log
from typing import Any

from ray_peft.foundation import dotted

KINDS = {"uniform": 2, "loguniform": 2, "randint": 2, "choice": None}
"""Each kind and how many arguments it takes; None is any number."""

_OTHER_NAMES = {
    "log_uniform": "loguniform", "qloguniform": "loguniform", "quniform": "uniform", "int_uniform": "randint",
    "int": "randint", "lograndint": "randint", "choices": "choice", "categorical": "choice", "options": "choice",
    "grid_search": "grid", "gridsearch": "grid",
}  # fmt: skip
"""How other tools call them."""


def distributions(template: Any, prefix: str = "") -> dict[str, tuple[str, list[Any]]]:
    """The distributions in a template: dotted key -> (kind, arguments); places in lists are numbers from 0."""
    ends = dotted.leaves(template, lambda value: kind_of(value) is not None, prefix)
    return {
        key: (kind, value[kind] if isinstance(value[kind], list) else [])
        for key, value in ends
        if (kind := kind_of(value)) is not None
    }


def kind_of(value: Any) -> str | None:
    """The kind of a mapping that is a distribution, else None."""
    if not isinstance(value, dict) or len(value) != 1:
        return None
    (kind,) = value
    return kind if kind in KINDS else None


def problem(kind: str, arguments: list[Any]) -> str | None:
    """Why nothing can be drawn, or None."""
    arity = KINDS[kind]
    if arity is None:
        if not arguments:
            return "needs a list with at least one entry"
        nested = next((key for entry in arguments for key in distributions(entry, "entry")), None)
        return nested and (
            "an entry holds a distribution itself, which cannot be drawn; write the entries as cells of a grid, each "
            "with its distributions, or write out the values"
        )
    numbers = all(isinstance(a, int | float) and not isinstance(a, bool) for a in arguments)
    if len(arguments) != arity or not numbers:
        return f"needs a list of two numbers, [low, high] (found {arguments!r:.60})"
    low, high = arguments
    if not low < high:
        return f"low ({low}) must be below high ({high})"
    if kind == "loguniform" and low <= 0:
        return f"low ({low}) must be above 0"
    if kind == "randint" and not all(isinstance(a, int) for a in arguments):
        return f"needs two whole numbers (found {arguments!r:.60})"
    return None


def misspelt(template: Any, settings: list[str], prefix: str = "") -> dict[str, str]:
    """Mappings that look like a distribution or a grid under another name: dotted key -> what was meant.

    Args:
        template: a cell of a search space, or what stands at `prefix` in it.
        settings: names of real settings, which are none.
        prefix: the dotted key of `template`.
    """

    def intended(value: Any) -> str | None:
        """The name that a mapping's only key was to be, where it is none."""
        if not isinstance(value, dict) or len(value) != 1:
            return None
        ((name, arguments),) = value.items()
        kinds = (*KINDS, "grid")
        if not isinstance(arguments, list) or name in kinds or name in settings:
            return None
        near = difflib.get_close_matches(name.lower(), kinds, n=1, cutoff=0.75)
        return _OTHER_NAMES.get(name.lower()) or (near[0] if near else None)

    ends = dotted.leaves(template, lambda value: intended(value) is not None, prefix)
    return {dotted.join(key, next(iter(value))): name for key, value in ends if (name := intended(value)) is not None}


def not_alone(template: Any, prefix: str = "") -> dict[str, tuple[str, str]]:
    """Mappings in which a distribution stands beside other keys: dotted key -> (kind, the others)."""

    def beside(value: Any) -> tuple[str, str] | None:
        """A mapping's distribution and its other keys, where it has both."""
        kind = next((key for key in value if key in KINDS), None) if isinstance(value, dict) else None
        return (kind, ", ".join(sorted(set(value) - {kind}))) if kind is not None and len(value) > 1 else None

    ends = dotted.leaves(template, lambda value: beside(value) is not None, prefix)
    return {key or "the file": keys for key, value in ends if (keys := beside(value)) is not None}


def draw(generator: random.Random, kind: str, arguments: list[Any]) -> Any:
    """One value; floats have six digits."""
    if kind == "choice":
        return generator.choice(arguments)
    low, high = arguments
    if kind == "randint":
        return generator.randrange(low, high)
    value = generator.uniform(low, high) if kind == "uniform" else exp(generator.uniform(log(low), log(high)))
    return float(f"{value:.6g}")
