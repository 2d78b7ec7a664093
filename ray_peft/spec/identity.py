"""The identity of a trial: the settings that decide its result, and the content of the files that it names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticUndefined

from ray_peft.foundation.strict import Strict
from ray_peft.spec.defaults import CHANGES_NO_RESULT, DEFAULTS, IDENTITY_VERSION, NAMES

if TYPE_CHECKING:
    from ray_peft.spec.base import TrialSpec


@dataclass(frozen=True)
class Content:
    """The content behind the names in a trial, wherever the files are."""

    model: str
    """Fingerprint of a local model; of a hub model, its commit."""
    data: str
    """Content hash of the prepared rows, which covers the tokenizer and its chat template."""
    files: str = ""
    """Content hash of the task files in `evaluation.benchmarks.include_path`."""


def differing(value: Strict) -> dict[str, Any]:
    """The settings that differ from the table of defaults, without names and what changes no result."""
    changed: dict[str, Any] = {}
    for name, default in _defaults(type(value)).items():
        setting = getattr(value, name)
        plain = _plain(setting)
        if name in ("name", "task") or not _same(plain, default, setting):
            changed[name] = plain
    return changed


def settings(spec: TrialSpec) -> dict[str, Any]:
    """The settings that decide a trial's result, apart from those of its data, which are part of its content."""
    decisive = {name: plain for name, plain in differing(spec).items() if name != "data"}
    if spec.train.fit is not None and spec.drops_by_pass():
        decisive.setdefault("train", {})["fit"] = spec.train.fit
    return decisive


def canonical(data: object) -> str:
    """One text for equal JSON-like data."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def trial_id(spec: TrialSpec, content: Content | None, members: Sequence[str] = ()) -> str:
    """The method's name and eight digits of a hash of the trial's settings and content.

    Args:
        spec: the trial.
        content: None before anything was read: then the names stand for themselves.
        members: of an ensemble, the ids of its members.
    """
    if content is None:
        left_out = CHANGES_NO_RESULT.get(type(spec.data).__name__, frozenset())
        data = {name: value for name, value in spec.data.plain().items() if name not in left_out}
        named: object = [spec.model.name, spec.model.revision, spec.model.tokenizer, data]
    else:
        # A commit is one of its repository, so the name belongs to it; a folder may lie anywhere.
        named = [hub_name(spec.model.name), asdict(content)]
    text = canonical([IDENTITY_VERSION, settings(spec), named, list(members)])
    return f"{spec.method.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def is_local(name: str) -> bool:
    """True if `name` means a path on this machine rather than a hub id."""
    return name.startswith((".", "/", "~")) or Path(name).is_absolute() or Path(name).exists()


def hub_name(name: str) -> str:
    """A hub id as it is, and nothing for a folder."""
    return "" if is_local(name) else name


@cache
def _defaults(kind: type[Strict]) -> dict[str, Any]:
    """The settings of a class that count, with their defaults."""
    table: dict[str, Any] = {}
    left_out: set[str] = set()
    for base in reversed(kind.__mro__):  # the defaults of the nearest class win
        table |= DEFAULTS.get(base.__name__, {})
        left_out |= CHANGES_NO_RESULT.get(base.__name__, frozenset()) | NAMES.get(base.__name__, frozenset())
    return {
        name: table[name] if name in table else field.get_default(call_default_factory=True)
        for name, field in kind.model_fields.items()
        if name not in left_out
    }


def _plain(value: Any) -> Any:
    """A setting as JSON-like data; of parts that are specs, the settings that differ from their own defaults."""
    if isinstance(value, Strict):
        return differing(value)
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    if isinstance(value, date):
        return value.isoformat()
    return value


def _same(plain: Any, default: Any, setting: Any) -> bool:
    """True if a setting is its default; a part that is there never equals one that is missing."""
    if default is PydanticUndefined:
        return False
    if isinstance(setting, Strict):
        return default is not None and not plain
    default_plain = default.plain() if isinstance(default, Strict) else default
    # As JSON, which tells the count 1 from the fraction 1.0.
    return canonical(plain) == canonical(default_plain)
