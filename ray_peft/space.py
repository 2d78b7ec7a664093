"""search_spaces/*.yaml -> trials; the only reader of YAML. The whole file is checked before anything runs."""

from __future__ import annotations

import difflib
import itertools
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import exp, log
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError

from ray_peft import profiles
from ray_peft.errors import SearchSpaceError, SpecError
from ray_peft.spec import SPECS, TrialSpec
from ray_peft.strict import Strict

_PartT = TypeVar("_PartT", bound=Strict)

MAX_TRIALS = 10_000
"""More cells than this is taken for a mistake in the file."""

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_DISTRIBUTIONS = {"uniform": 2, "loguniform": 2, "randint": 2, "choice": None}


class SearchSpec(Strict):
    """How distributions are drawn; without distributions it must be absent."""

    samples: int = Field(ge=1)
    """Trials drawn per cell of the grid, so that every method gets the same tuning budget."""
    algorithm: Literal["random", "optuna"] = "random"
    """`random` draws all trials beforehand; `optuna` (TPE) proposes each from the results so far."""
    metric: Literal["eval_loss", "bleu4", "rouge_l"] = "eval_loss"
    """What `optuna` improves: the loss downwards, the scores upwards."""
    seed: int = Field(default=0, ge=0)


class TrackingSpec(Strict):
    """Where results are kept."""

    uri: str | None = None
    """MLflow tracking URI; null takes MLFLOW_TRACKING_URI, else a SQLite file beside the outputs."""
    experiment: str | None = None
    """MLflow experiment; null takes the name of the search space."""


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
    profile: str | None = None
    """The profile whose settings took the place of the file's; null leaves them as they are written."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a repeated key is an error instead of a silent overwrite, and 1e-4 is a number."""


_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


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
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SearchSpaceError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SearchSpaceError(f"{path}: cannot be read: {error}") from None
    return parse(text, str(path), overrides, profile)


def parse(text: str, source: str, overrides: list[str] | None = None, profile: str | None = None) -> Space:
    """Expand and check the text of a search space; `source` names it in errors.

    Raises:
        SearchSpaceError: anything wrong with the text, all problems at once.
    """
    plain = _yaml(text, source)
    if not isinstance(plain, dict):
        raise SearchSpaceError(f"{source}: must be a mapping of keys to values (found {_short(plain)})")
    keys = profiles.settle(plain, profile, source)
    keys -= {_apply_override(plain, override) for override in overrides or []}
    try:
        return replace(_checked(plain, source), profile=profile)
    except SearchSpaceError as error:
        raise SearchSpaceError(profiles.blamed(str(error), keys, source, profile)) from None


def _checked(plain: dict[str, Any], source: str) -> Space:
    """The space that a file says, with its profile and overrides in place."""
    problems: list[str] = []
    plain = _expand_variables(plain, source, "", problems)
    if problems:
        raise SearchSpaceError("\n".join(problems))
    name = str(plain.pop("name", Path(source).stem))
    description = str(plain.pop("description", ""))
    search = _part(SearchSpec, plain.pop("search", None), source, "search", problems)
    tracking = _part(TrackingSpec, plain.pop("tracking", {}), source, "tracking", problems) or TrackingSpec()
    report = _part(ReportSpec, plain.pop("report", {}), source, "report", problems) or ReportSpec()
    templates = _cells(plain, source)
    drawn = list(_draws(templates, search, source, problems))
    if problems:
        raise SearchSpaceError("\n".join(problems))
    trials = _validate(drawn, source)
    return Space(name, description, trials, search, tracking, templates, report)


def fill(template: dict[str, Any], values: dict[str, Any], source: str) -> TrialSpec:
    """One trial: `template` with each distribution at a dotted key replaced by its value in `values`.

    Raises:
        SearchSpaceError: the values make no valid trial.
    """
    return _validate([_substitute(template, values, "")], source)[-1]


def distributions(template: Any, prefix: str = "") -> dict[str, tuple[str, list[Any]]]:
    """The distributions in a template: dotted key -> (kind, arguments)."""
    if not isinstance(template, dict):
        return {}
    kind = _distribution(template)
    if kind:
        given = template[kind]
        return {prefix: (kind, given if isinstance(given, list) else [])}
    found: dict[str, tuple[str, list[Any]]] = {}
    for key, value in template.items():
        found |= distributions(value, f"{prefix}.{key}" if prefix else key)
    return found


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown line"
        raise SearchSpaceError(f"{source}: {where}: {error.problem or 'not valid YAML'}") from None
    except yaml.YAMLError as error:
        raise SearchSpaceError(f"{source}: not valid YAML: {error}") from None


def _apply_override(plain: dict[str, Any], override: str) -> str:
    """Put a `key.path=value` setting into `plain`; returns its key."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise SearchSpaceError(f"--set {override}: must be key.path=value")
    profiles.put(plain, key, _yaml(value, f"--set {override}"), f"--set {override}")
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
        found = os.environ.get(name, default)
        if found is None:
            problems.append(
                f"{source}: {key}: environment variable {name} is not set (found {value!r}); "
                f"set it, or write the path into the file"
            )
            return ""
        return found

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
    cells: list[dict[str, Any]] = list(itertools.islice(_expand(plain, source, ""), MAX_TRIALS + 1))
    if len(cells) > MAX_TRIALS:
        raise SearchSpaceError(f"{source}: the grid has more than {MAX_TRIALS} cells; split it into several files")
    return cells


def _expand(value: Any, source: str, key: str) -> Iterator[Any]:
    """Every way to choose one entry from each grid inside `value`."""
    if isinstance(value, dict) and "grid" in value:
        entries = value["grid"]
        if len(value) > 1:
            extra = ", ".join(sorted(set(value) - {"grid"}))
            raise SearchSpaceError(f"{source}: {key}: grid stands alone in its mapping (found also {extra})")
        if not isinstance(entries, list) or not entries:
            raise SearchSpaceError(f"{source}: {key}.grid: must be a list with entries (found {_short(entries)})")
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


def _distribution(value: dict[str, Any]) -> str | None:
    if len(value) != 1:
        return None
    (kind,) = value
    return kind if kind in _DISTRIBUTIONS else None


def _draws(
    templates: list[dict[str, Any]], search: SearchSpec | None, source: str, problems: list[str]
) -> Iterator[dict[str, Any]]:
    searched = [distributions(template) for template in templates]
    for found in searched:
        for key, (kind, arguments) in found.items():
            problem = _distribution_problem(kind, arguments)
            if problem:
                problems.append(f"{source}: {key}.{kind}: {problem}")
    if problems:
        problems[:] = list(dict.fromkeys(problems))
        return
    problem = _search_problem(templates, searched, search)
    if problem:
        problems.append(f"{source}: {problem}")
        return
    for index, (template, found) in enumerate(zip(templates, searched, strict=True)):
        generator = random.Random(f"{search.seed if search else 0}:{index}")
        for _ in range(search.samples if search and found else 1):
            yield _substitute(template, {key: _draw(generator, *how) for key, how in found.items()}, "")


def _search_problem(
    templates: list[dict[str, Any]], searched: list[dict[str, tuple[str, list[Any]]]], search: SearchSpec | None
) -> str | None:
    """Why `search` does not fit the distributions, or None."""
    if search is None:
        key = next((key for found in searched for key in found), None)
        return key and f"search: missing, but {key} is a distribution; add `search: {{samples: N}}`"
    if not any(searched):
        return f"search: there is no distribution to search (found samples {search.samples})"
    if search.algorithm != "optuna":
        return None
    if len(templates) > 1:
        return (
            f"search.algorithm: optuna searches one space, but the grid has {len(templates)} cells; "
            "use random, or write {choice: [...]} in place of {grid: [...]}"
        )
    method = templates[0].get("method")
    choices = method.get("choice", [method]) if isinstance(method, dict) else []
    if any(isinstance(each, dict) and each.get("name") == "ensemble" for each in choices):
        return (
            "search.algorithm: optuna proposes one trial at a time, but an ensemble is made of several; "
            "search the members first, then write the best ones into an ensemble"
        )
    return None


def _distribution_problem(kind: str, arguments: list[Any]) -> str | None:
    wanted = _DISTRIBUTIONS[kind]
    if wanted is None:
        return None if arguments else "needs at least one entry (found none)"
    numbers = all(isinstance(a, int | float) and not isinstance(a, bool) for a in arguments)
    if len(arguments) != wanted or not numbers:
        return f"needs two numbers [low, high] (found {_short(arguments)})"
    low, high = arguments
    if not low < high:
        return f"low ({low}) must be below high ({high})"
    if kind == "loguniform" and low <= 0:
        return f"low ({low}) must be above 0"
    if kind == "randint" and not all(isinstance(a, int) for a in arguments):
        return f"needs two whole numbers (found {_short(arguments)})"
    return None


def _draw(generator: random.Random, kind: str, arguments: list[Any]) -> Any:
    if kind == "choice":
        return generator.choice(arguments)
    low, high = arguments
    if kind == "randint":
        return generator.randrange(low, high)
    value = generator.uniform(low, high) if kind == "uniform" else exp(generator.uniform(log(low), log(high)))
    return float(f"{value:.6g}")


def _substitute(template: Any, values: dict[str, Any], prefix: str) -> Any:
    if prefix in values:
        return values[prefix]
    if isinstance(template, dict):
        return {k: _substitute(v, values, f"{prefix}.{k}" if prefix else k) for k, v in template.items()}
    return template


def _validate(drawn: list[dict[str, Any]], source: str) -> list[TrialSpec]:
    """All trials, each once, an ensemble's members before it; or one error with every problem once."""
    trials: dict[str, TrialSpec] = {}
    broken: dict[str, int] = {}
    for plain in drawn:
        try:
            trial = TrialSpec.from_plain(plain).located()
            trials |= {each.trial_id: each for each in (*trial.members(), trial) if each.trial_id not in trials}
        except ValidationError as error:
            for line in dict.fromkeys(explain(error, "")):
                broken[line] = broken.get(line, 0) + 1
        except (TypeError, SpecError) as error:  # a date or another YAML type that JSON lacks; a task that is not there
            broken[str(error)] = broken.get(str(error), 0) + 1
    if broken:
        total = len(drawn)
        raise SearchSpaceError("\n".join(f"{source}: {line}, in {n} of {total} trials" for line, n in broken.items()))
    return list(trials.values())


def explain(error: ValidationError, prefix: str = "") -> Iterator[str]:
    """One line per problem: key, rule, value found."""
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in (prefix, *_as_written(problem["loc"])) if str(part))
        found = f" (found {_short(problem['input'])})"
        if problem["type"] == "missing":
            yield f"{key}: missing"
        elif problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), _field_names(), n=1)
            yield f"{key}: unknown key{f', did you mean {near[0]}?' if near else ''}{found}"
        elif problem["type"] == "value_error":
            for line in problem["msg"].removeprefix("Value error, ").splitlines():
                yield f"{key}: {line}" if key else line
        else:
            yield f"{key or 'trial'}: {problem['msg']}{found}"


def _as_written(location: tuple[int | str, ...]) -> list[int | str]:
    """A place in an ensemble's members as it stands in the file: pydantic adds the method's name after `method`."""
    if "members" not in location:
        return list(location)
    return [part for before, part in zip((None, *location), location, strict=False) if before != "method"]


@cache
def _field_names() -> list[str]:
    """Every key that a spec knows, for suggestions."""
    schemas = [part for spec in SPECS.values() for part in spec.model_json_schema()["$defs"].values()]
    names = {name for schema in schemas for name in schema.get("properties", {})}
    return sorted(names | set(TrialSpec.model_fields))


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
