"""Distributions in a search space: where they stand, whether they are right, and what is drawn from them."""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator
from math import exp, log
from typing import Any

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
    if isinstance(template, list):
        inner: Iterator[tuple[Any, Any]] = iter(enumerate(template))
    elif isinstance(template, dict):
        kind = kind_of(template)
        if kind:
            given = template[kind]
            return {prefix: (kind, given if isinstance(given, list) else [])}
        inner = iter(template.items())
    else:
        return {}
    return {
        place: how
        for key, value in inner
        for place, how in distributions(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def kind_of(value: Any) -> str | None:
    """The kind of a mapping that is a distribution, else None."""
    if not isinstance(value, dict) or len(value) != 1:
        return None
    (kind,) = value
    return kind if kind in KINDS else None


def problem(kind: str, arguments: list[Any]) -> str | None:
    """Why nothing can be drawn, or None."""
    wanted = KINDS[kind]
    if wanted is None:
        if not arguments:
            return "needs a list with at least one entry"
        nested = next((key for entry in arguments for key in distributions(entry, "entry")), None)
        return nested and (
            "an entry holds a distribution itself, which cannot be drawn; write the entries as cells of a grid, each "
            "with its distributions, or write out the values"
        )
    numbers = all(isinstance(a, int | float) and not isinstance(a, bool) for a in arguments)
    if len(arguments) != wanted or not numbers:
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
    if isinstance(template, list):
        inner: Iterator[tuple[Any, Any]] = iter(enumerate(template))
    elif isinstance(template, dict):
        if len(template) == 1:
            ((name, value),) = template.items()
            known = (*KINDS, "grid")
            near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.75)
            meant = _OTHER_NAMES.get(name.lower()) or (near[0] if near else None)
            if isinstance(value, list) and meant and name not in known and name not in settings:
                return {f"{prefix}.{name}".lstrip("."): meant}
        inner = iter(template.items())
    else:
        return {}
    return {
        place: meant
        for key, value in inner
        for place, meant in misspelt(value, settings, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def not_alone(template: Any, prefix: str = "") -> dict[str, tuple[str, str]]:
    """Mappings in which a distribution stands beside other keys: dotted key -> (kind, the others)."""
    if isinstance(template, list):
        inner: Iterator[tuple[Any, Any]] = iter(enumerate(template))
    elif isinstance(template, dict):
        kind = next((key for key in template if key in KINDS), None)
        if kind is not None and len(template) > 1:
            return {prefix or "the file": (kind, ", ".join(sorted(set(template) - {kind})))}
        inner = iter(template.items())
    else:
        return {}
    return {
        place: how
        for key, value in inner
        for place, how in not_alone(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def draw(generator: random.Random, kind: str, arguments: list[Any]) -> Any:
    """One value; floats have six digits."""
    if kind == "choice":
        return generator.choice(arguments)
    low, high = arguments
    if kind == "randint":
        return generator.randrange(low, high)
    value = generator.uniform(low, high) if kind == "uniform" else exp(generator.uniform(log(low), log(high)))
    return float(f"{value:.6g}")


def substitute(template: Any, values: dict[str, Any], prefix: str = "") -> Any:
    """`template` with what stands at each dotted key of `values` replaced."""
    if prefix in values:
        return values[prefix]
    if isinstance(template, dict):
        return {k: substitute(v, values, f"{prefix}.{k}" if prefix else k) for k, v in template.items()}
    if isinstance(template, list):
        return [substitute(v, values, f"{prefix}.{i}" if prefix else str(i)) for i, v in enumerate(template)]
    return template
