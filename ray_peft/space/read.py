"""search_spaces/*.yaml -> trials; the only reader of YAML. The whole file is checked before anything runs."""

from __future__ import annotations

import itertools
import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from ray_peft.errors import SearchSpaceError, SpecError
from ray_peft.foundation import dotted
from ray_peft.foundation.strict import Strict
from ray_peft.space import profiles, yaml_text
from ray_peft.space.distributions import distributions, draw, misspelt, not_alone
from ray_peft.space.distributions import problem as distribution_problem
from ray_peft.space.explained import explain, field_names, short
from ray_peft.space.search import SearchSpec, scheduler_problem, search_problem
from ray_peft.spec import TrialSpec

_PartT = TypeVar("_PartT", bound=Strict)

MAX_TRIALS = 10_000
"""More cells than this is taken for a mistake in the file."""

MOST_PROBLEMS = 30
"""Problems of a file in an error; each draw may have one of its own."""

LONGEST_NAME = 120
DEVICES = frozenset({"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))})
"""Names that Windows keeps for itself, with any ending."""
_RESERVED = DEVICES if os.name == "nt" else frozenset()

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class TrackingSpec(Strict):
    """Where results are kept."""

    uri: str | None = None
    """MLflow tracking URI; None takes MLFLOW_TRACKING_URI, else a SQLite file beside the outputs."""
    experiment: str | None = None
    """MLflow experiment; None takes the name of the search space."""


class ReportSpec(Strict):
    """What the sweep's report shows."""

    loss_steps: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Optimizer steps at which losses are compared; empty takes about six that are spread over the run."""


@dataclass(frozen=True)
class Space:
    """A checked search space."""

    name: str
    description: str
    trials: list[TrialSpec]
    """All trials; with `optuna`, one draw for each, which shows their kind but not their values."""
    search: SearchSpec | None
    tracking: TrackingSpec
    templates: list[dict[str, Any]]
    """The grid's cells with their distributions still in place."""
    report: ReportSpec = ReportSpec()
    notes: tuple[str, ...] = ()
    """Sentences on what a reader may not expect: cells that are the same trial."""
    profile: str | None = None
    """The profile whose settings took the place of the file's; None leaves them as they are written."""


def load(path: str | Path, overrides: list[str] | None = None, profile: str | None = None) -> Space:
    """Read, expand and check a search space.

    Args:
        path: a YAML file.
        overrides: `key.path=value` settings that replace those of the file; values are YAML.
        profile: one of the file's `profiles`, whose settings come before `overrides`.

    Raises:
        SearchSpaceError: anything wrong with the file, all problems at once.
    """
    path = Path(path)
    return parse(yaml_text.read(path), str(path), overrides, profile)


def parse(text: str, source: str, overrides: list[str] | None = None, profile: str | None = None) -> Space:
    """Expand and check the text of a search space; `source` names it in errors.

    Raises:
        SearchSpaceError: anything wrong with the text, all problems at once.
    """
    plain = yaml_text.parse(text, source)
    if not isinstance(plain, dict):
        content = "an empty file" if plain is None else short(plain)
        raise SearchSpaceError(f"{source}: must be a mapping of keys to values (found {content})")
    keys = profiles.settle(plain, profile, source)
    keys -= {_apply_override(plain, override) for override in overrides or []}
    try:
        return replace(_checked(plain, source), profile=profile)
    except SearchSpaceError as error:
        raise SearchSpaceError(profiles.blamed(str(error), keys, source, profile)) from None


def _checked(plain: dict[str, Any], source: str) -> Space:
    """The space of a file whose profile and overrides are already applied."""
    problems: list[str] = []
    plain = _expand_variables(plain, source, "", problems)
    if problems:
        raise SearchSpaceError("\n".join(problems))
    name = _name(plain.pop("name", Path(source).stem), source, problems)
    description = str(plain.pop("description", None) or "")
    search_settings = plain.pop("search", None)
    search = _part(SearchSpec, search_settings, source, "search", problems)
    tracking = _part(TrackingSpec, plain.pop("tracking", {}), source, "tracking", problems) or TrackingSpec()
    report = _part(ReportSpec, plain.pop("report", {}), source, "report", problems) or ReportSpec()
    if search_settings is not None and search is None:
        raise SearchSpaceError("\n".join(problems))
    templates = _cells(plain, source)
    drawn = list(_draws(templates, search, source, problems))
    if problems:
        raise SearchSpaceError("\n".join(problems))
    proposed = search is not None and search.algorithm == "optuna"
    trials, notes = _validate(drawn, source, proposed=proposed)
    if search is not None and (text := scheduler_problem(search, trials)):
        raise SearchSpaceError(f"{source}: {text}")
    return Space(name, description, trials, search, tracking, templates, report, notes=tuple(notes))


def _name(value: Any, source: str, problems: list[str]) -> str:
    """The name of a search space, which names its folder and its MLflow experiment on every system."""
    way = "give it letters, digits, '.', '-', '_' or spaces, or leave it out to take the file's name"
    if not isinstance(value, str):
        problems.append(f"{source}: name: must be text (found {short(value)}); {way}")
    elif (
        not value.strip(" .")
        or value != value.strip()
        or value.endswith(".")
        or len(value) > LONGEST_NAME
        or any(character in '<>:"/\\|?*' or ord(character) < 32 or ord(character) == 127 for character in value)
        or value.partition(".")[0].upper() in _RESERVED
    ):
        problems.append(f"{source}: name: cannot name a folder on every system (found {short(value)}); {way}")
    return str(value)


def fill(template: dict[str, Any], values: dict[str, Any], source: str) -> TrialSpec:
    """One trial: `template` with each distribution at a dotted key replaced by its value in `values`.

    Raises:
        SearchSpaceError: the values make no valid trial.
    """
    return _validate([dotted.replaced(template, values)], source)[0][-1]


def changed(trial: TrialSpec, overrides: list[str], source: str) -> TrialSpec:
    """A trial with `key.path=value` settings in place of its own; values are YAML.

    Raises:
        SearchSpaceError: they make no valid trial; `source` names it.
    """
    plain = trial.plain()
    for override in overrides:
        _apply_override(plain, override)
    return _validate([plain], source)[0][-1]


def _apply_override(plain: dict[str, Any], override: str) -> str:
    """Put a `key.path=value` setting into `plain`; returns its key."""
    key, equals, value = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise SearchSpaceError(f"--set {override}: must be key.path=value")
    profiles.put(plain, key, yaml_text.parse(value, f"--set {override}"), f"--set {override}")
    return key


def _expand_variables(value: Any, source: str, key: str, problems: list[str]) -> Any:
    if isinstance(value, dict):
        return {k: _expand_variables(v, source, f"{key}.{k}".lstrip("."), problems) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand_variables(v, source, key, problems) for v in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        text = os.environ.get(name, default)
        if text is None:
            problems.append(
                f"{source}: {key}: environment variable {name} is not set (found {value!r}); "
                f"set it, or write the path into the file"
            )
            return ""
        return text

    return _VARIABLE.sub(replace, value)


def _part(kind: type[_PartT], plain: Any, source: str, key: str, problems: list[str]) -> _PartT | None:
    if plain is None:
        return None
    try:
        return kind.from_plain(plain)
    except ValidationError as error:
        problems += [f"{source}: {line}" for line in explain(error, key)]
        return None
    except TypeError as error:
        problems.append(f"{source}: {key}: {error}")
        return None


def _cells(plain: dict[str, Any], source: str) -> list[dict[str, Any]]:
    cells = _count(plain)
    if cells > MAX_TRIALS:
        raise SearchSpaceError(
            f"{source}: the grid has {cells:,} cells, more than {MAX_TRIALS:,}; split it into several files"
        )
    return list(_expand(plain, source, ""))


def _count(value: Any) -> int:
    """Cells of the grids inside `value`, at least 1; found without expanding them."""
    if isinstance(value, dict) and "grid" in value:
        entries = value["grid"]
        return sum(map(_count, entries)) if isinstance(entries, list) else 1
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return math.prod(map(_count, inner))


def _expand(value: Any, source: str, key: str) -> Iterator[Any]:
    """Every way to choose one entry from each grid inside `value`."""
    if isinstance(value, dict) and "grid" in value:
        entries = value["grid"]
        if len(value) > 1:
            extra = ", ".join(sorted(set(value) - {"grid"}))
            raise SearchSpaceError(f"{source}: {key}: grid stands alone in its mapping (found also {extra})")
        if not isinstance(entries, list) or not entries:
            raise SearchSpaceError(f"{source}: {key}.grid: must be a list with entries (found {short(entries)})")
        for entry in entries:
            yield from _expand(entry, source, key)
    elif isinstance(value, dict):
        keys = list(value)
        parts = [list(_expand(value[k], source, f"{key}.{k}".lstrip("."))) for k in keys]
        for choice in itertools.product(*parts):
            yield dict(zip(keys, choice, strict=True))
    elif isinstance(value, list):
        parts = [list(_expand(v, source, f"{key}.{i}".lstrip("."))) for i, v in enumerate(value)]
        for choice in itertools.product(*parts):
            yield list(choice)
    else:
        yield value


def _draws(
    templates: list[dict[str, Any]], search: SearchSpec | None, source: str, problems: list[str]
) -> Iterator[dict[str, Any]]:
    searched = [distributions(template) for template in templates]
    problems += [f"{source}: {text}" for text in _draw_problems(templates, searched, search)]
    if problems:
        return
    for index, (template, places) in enumerate(zip(templates, searched, strict=True)):
        generator = random.Random(f"{search.seed if search else 0}:{index}")
        for _ in range(search.samples or 1 if search and places else 1):
            yield dotted.replaced(template, {key: draw(generator, *how) for key, how in places.items()})


def _draw_problems(
    templates: list[dict[str, Any]], searched: list[dict[str, tuple[str, list[Any]]]], search: SearchSpec | None
) -> list[str]:
    """The reasons why nothing can be drawn, each once; empty if there are none."""
    problems = [
        f"{key}.{kind}: {text}"
        for places in searched
        for key, (kind, arguments) in places.items()
        if (text := distribution_problem(kind, arguments))
    ]
    problems += [
        f"{key}: no such distribution, did you mean {suggestion}?"
        for template in templates
        for key, suggestion in misspelt(template, field_names()).items()
    ]
    problems += [
        f"{key}: {kind} stands alone in its mapping (found also {others})"
        for template in templates
        for key, (kind, others) in not_alone(template).items()
    ]
    if problems:
        return list(dict.fromkeys(problems))
    if text := search_problem(templates, searched, search):
        return [text]
    samples = search.samples or 1 if search else 1
    trials = sum(samples if places else 1 for places in searched)
    if trials > MAX_TRIALS:
        return [f"search.samples: makes {trials:,} trials, more than {MAX_TRIALS:,} (found {samples})"]
    return []


def _validate(drawn: list[dict[str, Any]], source: str, proposed: bool = False) -> tuple[list[TrialSpec], list[str]]:
    """All trials, each once, an ensemble's members before it, and notes on cells that are the same trial.

    Raises:
        SearchSpaceError: every problem once; for draws that Optuna only `proposed`, if none of them is a valid trial.
    """
    trials: dict[str, TrialSpec] = {}
    cells: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    for plain in drawn:
        try:
            trial = TrialSpec.from_plain(plain).located()
            if trial.train.warm_start is not None:
                raise SpecError("train.warm_start: no file can set it; `ray-peft ctl SWEEP clone TRIAL --warm` does")
            trials |= {member.trial_id: member for member in (*trial.members(), trial) if member.trial_id not in trials}
            cells[trial.trial_id] += 1
        except ValidationError as error:
            broken.update(dict.fromkeys(explain(error, "")).keys())
        except (TypeError, SpecError) as error:  # a type that JSON lacks; a task that is not there
            broken[str(error)] += 1
    lines = [f"{line}, in {n} of {len(drawn)} trials" for line, n in broken.most_common(MOST_PROBLEMS)]
    if proposed and trials:
        return list(trials.values()), [f"caution: the search skips such proposals: {line}" for line in lines]
    if broken:
        lines += [f"and {len(broken) - len(lines):,} more problems"] if len(broken) > len(lines) else []
        raise SearchSpaceError("\n".join(f"{source}: {line}" for line in lines))
    repeated = [
        f"{count} cells or draws of the search space are the same trial ({trials[trial_id].method.name}): it runs once"
        for trial_id, count in cells.items()
        if count > 1
    ]
    return list(trials.values()), repeated
