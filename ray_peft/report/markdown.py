"""report.md: the comparison for a reader, from what was compared to how to run it again."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ray_peft.metrics.bootstrap import DifferenceInterval
from ray_peft.report.atomic import write_text
from ray_peft.report.digits import MISSING, count, fixed, percent, size, speed, spread_text
from ray_peft.report.escape import entry, fenced, inline, paragraphs, table
from ray_peft.report.flat import flat_spec
from ray_peft.report.labels import differing, setting_text
from ray_peft.report.table import Row, Score, SeedGroup, error_line, rows, seed_groups
from ray_peft.report.uncertainty import Answers, Intervals, intervals
from ray_peft.result import Provenance, Sample, TrialResult

_RERUN = """\
Every line of `results.jsonl` holds the whole spec of its trial. To run one trial again:

```sh
python -c "import json; rows = map(json.loads, open('results.jsonl', encoding='utf-8')); \\
json.dump(next(row['spec'] for row in rows if row['trial_id'] == '{trial_id}'), open('spec.json', 'w'))"
ray-peft run spec.json
```

To write this report again from the results: `ray-peft report` with this folder."""


def write_markdown(
    results: Sequence[TrialResult],
    samples: Mapping[str, Sequence[Sample]],
    path: Path,
    *,
    title: str,
    description: str,
    notes: Sequence[str],
    answers: Answers | None = None,
    planned: Sequence[str] = (),
) -> None:
    """Write the report of a sweep.

    Args:
        results: its trials.
        samples: by trial id, some held-out prompts with the trial's answers.
        path: of the file.
        title: of the report, as plain text.
        description: what the sweep asks, as plain text.
        notes: what to know about the data, such as counts of rows, one entry each.
        answers: by trial id, predictions and references of every generated row; gives differences their intervals.
        planned: ids of the trials that the sweep was to run; those without a result are listed.
    """
    compared = rows(results)
    sections = [
        ("", _head(compared, title, description, notes)),
        ("Scores", _scores(compared, intervals(compared, answers or {}))),
        ("Over seeds", _over_seeds(seed_groups(compared))),
        ("Resources", _resources(compared)),
        ("Settings that differ", _settings(compared)),
        ("Trials that did not finish", _unfinished(compared)),
        ("Trials that were not run", _not_run(compared, planned)),
        ("Samples", _samples(compared, samples)),
        ("Machine and versions", _machine(compared)),
        ("How to run it again", _RERUN.format(trial_id=compared[0].trial_id) if compared else ""),
    ]
    text = "\n\n".join(f"## {name}\n\n{body}" if name else body for name, body in sections if body)
    write_text(Path(path), text + "\n")


def _head(compared: Sequence[Row], title: str, description: str, notes: Sequence[str]) -> str:
    blocks = [f"# {inline(title)}", paragraphs(description)]
    if not compared:
        blocks.append("No trial has a result.")
    specs = [row.result.spec for row in compared]
    ended = Counter(row.status.replace("_", " ") for row in compared)
    facts: dict[str, Sequence[str]] = {
        "Trials": [f"{len(compared)} ({', '.join(f'{number} {status}' for status, number in ended.items())})"],
        "Methods": [spec.method.name for spec in specs],
        "Models": [_without_folders(spec.model.name) for spec in specs],
        "Data": [
            f"{source.label}: {setting_text(source.train)} for training, {setting_text(source.test)} held out"
            for spec in specs
            for source in spec.data.sources
        ],
        "Training": [
            f"{_length(spec.train.steps, spec.train.epochs)} of {spec.train.batch_size} rows a step, "
            f"loss on {'all tokens' if spec.train.loss == 'all' else 'answers'}, {spec.train.schedule} schedule"
            for spec in specs
        ],
        "Seeds": [str(spec.seed) for spec in specs],
    }
    listed = [f"- {name}: {inline(_distinct(values))}" for name, values in facts.items() if compared]
    listed += [f"- {entry(note)}" for note in notes]
    return "\n\n".join(block for block in [*blocks, "\n".join(listed)] if block)


def _without_folders(model: str) -> str:
    """A hub id as it is; of a local folder its name, since its place says nothing to a reader elsewhere."""
    return Path(model).name if Path(model).is_absolute() else model


def _length(steps: int | None, epochs: float | None) -> str:
    return f"{steps} steps" if steps is not None else f"{epochs:g} epochs"


def _scores(compared: Sequence[Row], found: Mapping[str, Intervals]) -> str:
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("Status", lambda row: row.status.replace("_", " ")),
        ("Eval loss", lambda row: fixed(row.eval_loss.value, 4)),
        ("vs base", lambda row: _difference(row.eval_loss)),
        ("BLEU-4", lambda row: fixed(row.bleu4.value, 4)),
        ("vs base", lambda row: _difference(row.bleu4, found[row.trial_id].bleu4 if row.trial_id in found else None)),
        ("ROUGE-L", lambda row: fixed(row.rouge_l.value, 4)),
        (
            "vs base",
            lambda row: _difference(row.rouge_l, found[row.trial_id].rouge_l if row.trial_id in found else None),
        ),
        ("Final train loss", lambda row: fixed(row.result.train_loss_final, 4)),
        ("Best eval loss", lambda row: fixed(row.result.eval_loss_best, 4)),
    ]
    text = _table(compared, columns, text_columns=2)
    bases = {row.base.trial_id for row in compared if row.base is not None}
    if bases:
        text += "\n\nEval loss: lower is better; BLEU-4 and ROUGE-L (0 to 1): higher is better."
        text += " The base is the model without fine-tuning, scored on the same rows."
    if found:
        text += (
            " In brackets: 95 % paired bootstrap interval of the difference over the generated rows."
            ' "Tied with base": the interval contains zero, so the difference is none that these rows can show.'
        )
    return text


def _difference(score: Score, interval: DifferenceInterval | None = None) -> str:
    if score.difference is None:
        return MISSING
    text = fixed(score.difference, 4, signed=True)
    if score.relative is not None:
        text += f" ({percent(score.relative, 1, signed=True)})"
    if interval is not None:
        text += f" \\[{fixed(interval.low, 4, signed=True)}, {fixed(interval.high, 4, signed=True)}\\]"
        text += "" if interval.excludes_zero else ", tied with base"
    return text


def _over_seeds(groups: Sequence[SeedGroup]) -> str:
    if not groups:
        return ""
    reads: list[tuple[str, int, bool, Callable[[Row], float | None]]] = [
        ("Eval loss", 4, False, lambda row: row.eval_loss.value),
        ("vs base", 4, True, lambda row: row.eval_loss.difference),
        ("BLEU-4", 4, False, lambda row: row.bleu4.value),
        ("vs base", 4, True, lambda row: row.bleu4.difference),
        ("ROUGE-L", 4, False, lambda row: row.rouge_l.value),
        ("vs base", 4, True, lambda row: row.rouge_l.difference),
        ("Peak memory [GiB]", 2, False, lambda row: row.peak_memory_gib),
        ("Training [s]", 1, False, lambda row: row.seconds("train_s")),
    ]
    lines = [
        [
            inline(group.label),
            f"{len(group.finished)} of {len(group.rows)}",
            *(spread_text(group.spread(read), places, signed=signed) for _, places, signed, read in reads),
        ]
        for group in groups
    ]
    header = ["Trials", "Seeds finished", *(name for name, *_ in reads)]
    return f"Mean over the finished seeds (least to greatest).\n\n{table(header, lines)}"


def _resources(compared: Sequence[Row]) -> str:
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("Peak memory [GiB]", _memory),
        ("Training [s]", lambda row: fixed(row.seconds("train_s"), 1)),
        ("Load [s]", lambda row: fixed(row.seconds("load_s"), 1)),
        ("Evaluate [s]", lambda row: fixed(row.seconds("evaluate_s"), 1)),
        ("Save [s]", lambda row: fixed(row.seconds("save_s"), 1)),
        ("Whole trial [s]", lambda row: fixed(row.seconds("wall_time_s"), 1)),
        ("Tokens/s", lambda row: speed(row.result.usage.tokens_per_s)),
        ("Steps/s", lambda row: fixed(row.result.usage.steps_per_s, 3)),
        ("Trainable parameters", _trainable),
        ("On disk", lambda row: size(row.result.adapter_bytes)),
    ]
    if not compared:
        return ""
    kinds = {row.on_gpu for row in compared if row.peak_memory_gib is not None}
    meaning = ["GPU: allocated / reserved on one GPU while training"] * (True in kinds)
    meaning += ["CPU: resident memory of the worker process"] * (False in kinds)
    text = _table(compared, columns)
    return text + (f"\n\nPeak memory on a {'; on a '.join(meaning)}. 1 GiB = 2\\*\\*30 bytes." if meaning else "")


def _memory(row: Row) -> str:
    usage = row.result.usage
    if not row.on_gpu:
        return fixed(usage.peak_rss_gib, 2)
    return f"{fixed(usage.peak_allocated_gib, 2)} / {fixed(usage.peak_reserved_gib, 2)}"


def _trainable(row: Row) -> str:
    if row.trainable_share is None:
        return MISSING
    return f"{count(row.result.trainable_parameters)} ({percent(row.trainable_share)})"


def _table(compared: Sequence[Row], columns: Sequence[tuple[str, Callable[[Row], str]]], text_columns: int = 1) -> str:
    """A line per row; columns that no row fills are left out."""
    if not compared:
        return ""
    filled = [(name, cells) for name, read in columns if set(cells := [read(row) for row in compared]) != {MISSING}]
    lines = [[inline(row.label), *(cells[index] for _, cells in filled)] for index, row in enumerate(compared)]
    return table(["Trial", *(name for name, _ in filled)], lines, text_columns=text_columns)


def _settings(compared: Sequence[Row]) -> str:
    flats = [flat_spec(row.result.spec) for row in compared]
    lines = []
    for row, flat, keys in zip(compared, flats, differing(flats), strict=True):
        methods = {key.removeprefix("method."): flat[key] for key in flat if key.startswith("method.")}
        others = {key: flat[key] for key in keys if not key.startswith("method.")}
        lines.append([inline(row.label), inline(row.trial_id), _pairs(methods), _pairs(others)])
    if not lines:
        return ""
    header = ["Trial", "Trial id", "Method's own settings", "Other settings that differ"]
    return table(header, lines, text_columns=len(header))


def _pairs(settings: Mapping[str, object]) -> str:
    named = [f"{key}={setting_text(value)}" for key, value in settings.items() if key != "name"]
    return inline(", ".join(named)) or MISSING


def _unfinished(compared: Sequence[Row]) -> str:
    return "\n".join(
        f"- {inline(row.label)} ({inline(row.trial_id)}): {row.status.replace('_', ' ')}: "
        f"{inline(error_line(row.result))}"
        for row in compared
        if row.status != "finished"
    )


def _not_run(compared: Sequence[Row], planned: Sequence[str]) -> str:
    known = {row.trial_id for row in compared}
    return "\n".join(f"- {inline(trial_id)}" for trial_id in dict.fromkeys(planned) if trial_id not in known)


def _samples(compared: Sequence[Row], samples: Mapping[str, Sequence[Sample]]) -> str:
    """Each prompt with its reference and the answers of all trials under it, in the order of the tables."""
    prompts: dict[tuple[int, str, str, str], list[tuple[str, str]]] = {}
    for row in compared:
        for sample in samples.get(row.trial_id, ()):
            key = (sample.row, sample.source_dataset, sample.prompt, sample.reference)
            prompts.setdefault(key, []).append((row.label, sample.answer))
    blocks = []
    for (number, source, prompt, reference), given in sorted(prompts.items(), key=lambda item: item[0]):
        blocks.append(f"### Row {number}, {inline(source)}\n\n**Prompt**\n\n{fenced(prompt)}")
        blocks.append(f"**Reference**\n\n{fenced(reference)}")
        blocks += [f"**Answer: {inline(label)}**\n\n{fenced(answer)}" for label, answer in given]
    return "\n\n".join(blocks)


def _machine(compared: Sequence[Row]) -> str:
    # A trial that failed early may have recorded nothing, which says nothing about the machine.
    made = [row.result.provenance for row in compared if row.result.provenance != Provenance()]
    if not made:
        return ""
    facts: dict[str, Sequence[str | None]] = {
        "Device": [one.device for one in made],
        "Workers per trial": [f"{one.num_workers} with {one.gpus_per_worker:g} GPU each" for one in made],
        "Git commit": [one.git_commit for one in made],
        "Model fingerprint": [one.model_fingerprint for one in made],
        "Prepared data": [one.data_key for one in made],
        "Started": _first_and_last(one.started_at for one in made if one.started_at),
    }
    packages = sorted({name for one in made for name in one.versions})
    listed = [f"- {name}: {inline(_distinct(values))}" for name, values in facts.items()]
    if packages:
        versions = ", ".join(f"{name} {_distinct([one.versions.get(name) for one in made])}" for name in packages)
        listed.append(f"- Versions: {inline(versions)}")
    return "\n".join(listed)


def _first_and_last(times: Iterable[str]) -> list[str]:
    ordered = sorted(times)
    return [" to ".join(dict.fromkeys([ordered[0], ordered[-1]]))] if ordered else []


def _distinct(values: Sequence[str | None]) -> str:
    """Each value once, in order; "-" if there is none."""
    return "; ".join(dict.fromkeys(value for value in values if value)) or MISSING
