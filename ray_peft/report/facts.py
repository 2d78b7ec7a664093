"""Sections on what was compared and how: facts, settings, failures, machine, how to run it again."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ray_peft.report.digits import MISSING
from ray_peft.report.document import Block, Bullets, Code, Comparison, Paragraph, Table
from ray_peft.report.flat import flat_spec
from ray_peft.report.labels import differing, short_text
from ray_peft.report.material import Material
from ray_peft.report.table import Row, error_line
from ray_peft.spec import TrialSpec
from ray_peft.trial.result import Provenance

MOST_VALUES = 20
"""Values that a line of facts spells out."""

_RERUN = """\
python -c "import json; rows = map(json.loads, open('results.jsonl', encoding='utf-8')); \\
json.dump(next(row['spec'] for row in rows if row['trial_id'] == '{trial_id}'), open('spec.json', 'w'))"
ray-peft run spec.json"""


def head(material: Material) -> list[Block]:
    """The question of the sweep."""
    blocks: list[Block] = [Paragraph(material.description)] if material.description else []
    return blocks if material.rows else [*blocks, Paragraph("No trial has a result.")]


def compared(material: Material) -> list[Block]:
    """Facts about the trials and the data."""
    items = [*(_facts(material.rows) if material.rows else ()), *material.notes]
    return [Bullets(tuple(items))] if items else []


def settings(compared: Sequence[Row]) -> list[Block]:
    """Every setting of each method, and the other settings that differ."""
    flats = [flat_spec(row.result.spec) for row in compared]
    lines = []
    for row, flat, keys in zip(compared, flats, differing(flats), strict=True):
        methods = {key.removeprefix("method."): flat[key] for key in flat if key.startswith("method.")}
        others = {key: flat[key] for key in keys if not key.startswith("method.")}
        lines.append((row.label, row.trial_id, _pairs(methods), _pairs(others)))
    if not lines:
        return []
    header = ("Trial", "Trial id", "Method's own settings", "Other settings that differ")
    return [Table(header=header, lines=tuple(lines), text_columns=len(header))]


def comparison(compared: Sequence[Row]) -> list[Block]:
    """Settings that differ, so that any two trials can be laid side by side; nothing of a single trial."""
    flats = [flat_spec(row.result.spec) for row in compared]
    texts = [{key: short_text(value) for key, value in flat.items()} for flat in flats]
    keys = [key for key in dict.fromkeys(key for text in texts for key in text) if len({t.get(key) for t in texts}) > 1]
    if not keys:
        return []
    values = tuple((key, tuple(text.get(key) for text in texts)) for key in keys)
    return [Comparison(trials=tuple(row.label for row in compared), settings=values)]


def unfinished(compared: Sequence[Row]) -> list[Block]:
    """Why trials did not finish."""
    items = tuple(
        f"{row.label} ({row.trial_id}): {row.status.replace('_', ' ')}: {error_line(row.result)}"
        for row in compared
        if row.status != "finished"
    )
    return [Bullets(items)] if items else []


def not_run(material: Material) -> list[Block]:
    """Planned trials without a result."""
    with_result = {row.trial_id for row in material.rows}
    items = tuple(trial_id for trial_id in dict.fromkeys(material.planned) if trial_id not in with_result)
    return [Bullets(items)] if items else []


def machine(compared: Sequence[Row]) -> list[Block]:
    """Where and with what the trials ran."""
    # A trial that failed early may have recorded nothing, which says nothing about the machine.
    provenances = [row.result.provenance for row in compared if row.result.provenance != Provenance()]
    if not provenances:
        return []
    facts: dict[str, Sequence[str | None]] = {
        "Device": [provenance.device for provenance in provenances],
        "Workers per trial": [
            f"{provenance.num_workers} with {provenance.gpus_per_worker:g} GPU each" for provenance in provenances
        ],
        "Git commit": [provenance.git_commit for provenance in provenances],
        "Model fingerprint": [provenance.model_fingerprint for provenance in provenances],
        "Prepared data": [provenance.data_key for provenance in provenances],
        "Started": _first_and_last(provenance.started_at for provenance in provenances if provenance.started_at),
    }
    packages = sorted({name for provenance in provenances for name in provenance.versions})
    items = [f"{name}: {_distinct(values)}" for name, values in facts.items()]
    if packages:
        versions = ", ".join(
            f"{name} {_distinct([provenance.versions.get(name) for provenance in provenances])}" for name in packages
        )
        items.append(f"Versions: {versions}")
    return [Bullets(tuple(items))]


def rerun(compared: Sequence[Row]) -> list[Block]:
    """The commands that run a trial, and this report, again."""
    if not compared:
        return []
    return [
        Paragraph("Every line of results.jsonl holds the whole spec of its trial. To run one trial again:"),
        Code(_RERUN.format(trial_id=compared[0].trial_id)),
        Paragraph("To write this report again from the results: ray-peft report with this folder."),
    ]


def _facts(compared: Sequence[Row]) -> list[str]:
    specs = [row.result.spec for row in compared]
    ended = Counter(row.status.replace("_", " ") for row in compared)
    facts: dict[str, Sequence[str]] = {
        "Trials": [f"{len(compared)} ({', '.join(f'{number} {status}' for status, number in ended.items())})"],
        "Methods": [spec.method.name for spec in specs],
        "Models": [_without_folders(spec.model.name) for spec in specs],
        "Data": [line for spec in specs for line in spec.data_lines()],
        "Training": [
            f"{_length(spec.train.steps, spec.train.epochs)} of {spec.train.batch_size} "
            f"{'images' if spec.task == 'text_to_image' else 'rows'} a step, {_objective(spec)}"
            f"{spec.loss_line()}, {spec.train.schedule} schedule"
            for spec in specs
        ],
        "Seeds": [str(spec.seed) for spec in specs],
    }
    return [f"{name}: {_distinct(values)}" for name, values in facts.items()]


def _without_folders(model: str) -> str:
    """A hub id as it is; for a local folder only its name, since its path means nothing to a reader elsewhere."""
    return Path(model).name if Path(model).is_absolute() else model


def _objective(spec: TrialSpec) -> str:
    """What is learned, where that is not the answers alone."""
    train = spec.train.plain()
    if train.get("objective", "sft") == "sft":
        return ""
    return f"objective {train['objective']} (beta {train['preference']['beta']:g}), "


def _length(steps: int | None, epochs: float | None) -> str:
    return f"{steps} steps" if steps is not None else f"{epochs:g} epochs"


def _pairs(named: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={short_text(value)}" for key, value in named.items() if key != "name") or MISSING


def _first_and_last(times: Iterable[str]) -> list[str]:
    ordered = sorted(times)
    return [" to ".join(dict.fromkeys([ordered[0], ordered[-1]]))] if ordered else []


def _distinct(values: Sequence[str | None]) -> str:
    """Each value once, in order, and of many the first; "-" if there is none."""
    distinct = list(dict.fromkeys(value for value in values if value))
    more = [f"{len(distinct) - MOST_VALUES} others"] if len(distinct) > MOST_VALUES else []
    return "; ".join([*distinct[:MOST_VALUES], *more]) or MISSING
