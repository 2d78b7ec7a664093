"""What to call a trial: its method and the settings that tell it from the other trials of its sweep."""

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ray_peft.methods.base import Stage
from ray_peft.report.flat import flat_spec
from ray_peft.spec import TrialSpec

_BARE = re.compile(r"[A-Za-z0-9_.:/+~-]+")
_MEMBERS = "method.members."
_WARM_START = "train.warm_start"
WARM = "warm"
"""The last word of a trial that did not start from the base, and is compared with no other."""
_DIGITS = 4
"""Of a number in a label."""
_ABSENT = "absent"
"""Stands for a key that a trial lacks; no JSON text, so it equals no value."""


def labels(trials: Mapping[str, TrialSpec], *, without: Collection[str] = ()) -> dict[str, str]:
    """A name in pure ASCII for each trial, by trial id; no two trials get the same one.

    A setting of a method is named if it differs between trials of that method, any other setting if it differs
    between any two trials. Where that leaves two names equal, they end in the trial id.

    Args:
        trials: the specs of one sweep, by trial id.
        without: dotted keys that are not named, such as `seed`.
    """
    flats = [_brief(flat_spec(spec)) for spec in trials.values()]
    texts = _value_texts(flats)
    keys_to_name = differing(flats)
    names = []
    for spec, flat, keys in zip(trials.values(), flats, keys_to_name, strict=True):
        words = [f"{_short_key(key, flat)}={texts[key][_identity(flat[key])]}" for key in keys if key not in without]
        words += [WARM] if spec.train.warm_start is not None else []
        names.append(" ".join([str(flat["method.name"]), *words]))
    often = Counter(names)
    return {
        trial_id: f"{label} ({trial_id})" if often[label] > 1 else label
        for trial_id, label in zip(trials, names, strict=True)
    }


def _brief(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the members of an ensemble as a list of their methods, and without what a trial started from.

    All of those settings would be no name.
    """
    members: dict[str, list[str]] = {}
    brief: dict[str, Any] = {}
    for key, value in flat.items():
        place, in_member, setting = key.removeprefix(_MEMBERS).partition(".")
        if key.startswith(_WARM_START):
            continue
        if not key.startswith(_MEMBERS) or not in_member:
            brief[key] = value
        elif setting in ("method.name", "model", "seed") and value is not None:
            members.setdefault(place, []).append(str(value))
    return brief | ({"method.members": [":".join(words) for words in members.values()]} if members else {})


def differing(flats: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For each flat spec its keys to name: model, then method, then the rest, each in the order of the spec."""
    shared = _varying(flats)
    by_method = {
        name: _varying([flat for flat in flats if flat["method.name"] == name])
        for name in {flat["method.name"] for flat in flats}
    }
    chosen = []
    for flat in flats:
        of_method = by_method[flat["method.name"]]
        keys = [key for key in flat if key in (of_method if key.startswith("method.") else shared)]
        chosen.append(sorted(keys, key=_rank))
    return chosen


def setting_text(value: Any) -> str:
    """A setting as a word in pure ASCII; different values give different words."""
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) and not _is_json(value) else json.dumps(value)
    if isinstance(value, list):
        return "[" + ",".join(setting_text(entry) for entry in value) + "]"
    return json.dumps(value, sort_keys=True)


def short_text(value: Any) -> str:
    """A setting as a word, its number with four digits: 0.0003 for 0.00030000000000000003, 1.234e-05 for a draw."""
    if isinstance(value, list):
        return "[" + ",".join(short_text(entry) for entry in value) + "]"
    if isinstance(value, float) and math.isfinite(value):
        short = float(f"{value:.{_DIGITS}g}")
        # Whole numbers keep all digits, which a reader counts.
        return setting_text(value if value.is_integer() else short)
    return setting_text(value)


def _rank(key: str) -> int:
    """The model's name, what is the method's alone, what all methods share such as lr, the rest."""
    if key == "model.name":
        return 0
    if not key.startswith("method."):
        return 3
    return 2 if key.removeprefix("method.") in Stage.model_fields else 1


def _varying(flats: Sequence[Mapping[str, Any]]) -> set[str]:
    """The keys that some of the specs lack, or hold with another value."""
    keys = {key for flat in flats for key in flat}
    return {key for key in keys if len({_identity(flat[key]) if key in flat else _ABSENT for flat in flats}) > 1}


def _value_texts(flats: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """For each key the word of each of its values; paths lose their folders where their ends differ."""
    values: dict[str, dict[str, Any]] = {}
    for flat in flats:
        for key, value in flat.items():
            values.setdefault(key, {})[_identity(value)] = value
    return {key: dict(zip(distinct, _texts(distinct.values()), strict=True)) for key, distinct in values.items()}


def _texts(values: Iterable[Any]) -> list[str]:
    """The words of different values, all different: the shortest kind that tells them apart."""
    full = [setting_text(value) for value in values]
    short = [short_text(_last_part(value)) for value in values]
    return short if len(set(short)) == len(full) else full


def _last_part(value: Any) -> Any:
    return value.rstrip("/").rpartition("/")[2] or value if isinstance(value, str) else value


def _short_key(key: str, keys: Iterable[str]) -> str:
    """The shortest end of `key` that is an end of no other key and begins with a name."""
    if key == "model.name":
        return "model"
    others = [other for other in keys if other != key]
    parts = key.split(".")
    for start in range(len(parts) - 1, 0, -1):
        end = ".".join(parts[start:])
        if not parts[start].isdigit() and not any(other == end or other.endswith(f".{end}") for other in others):
            return end
    return key


def _identity(value: Any) -> str:
    """Text that is equal for equal values; 1, 1.0 and true differ."""
    return json.dumps(value, sort_keys=True)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
