"""The trials of search_spaces/peft_methods.yaml on one GPU, and their table: scores over seeds, forgetting, memory.

With RAY_PEFT_MODEL and RAY_PEFT_ALPACA set, in turn:
    python benchmarks/method_table.py run FOLDER --steps 100 --rows 200 --share 0.125 --seconds 420
    python benchmarks/method_table.py table FOLDER OUT.json
    python benchmarks/method_table.py markdown OUT.json

`run` starts a `ray-peft sweep` for each seed; the next seed's begins once few trials of the one before are left, so
that the GPU does not wait for it. After --seconds, what runs is interrupted as by Ctrl-C: earlier seeds are whole then.
`table` reads the rows of all seeds. Trials share the GPU, so their seconds say nothing of a method.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from provenance import write

from ray_peft.metrics.intervals import Numbers, ScoreInterval, compare, interval, mean_parts
from ray_peft.metrics.seeds import seed_variance, widened
from ray_peft.report.files import read_material
from ray_peft.report.uncertainty import Statistics
from ray_peft.space import yaml_text
from ray_peft.trial.result import TrialResult

SPACE = Path(__file__).parents[1] / "search_spaces" / "peft_methods.yaml"
SEEDS = (42, 43, 44)
WARM_UPS = 5
"""Processes that try the methods on shapes before the first sweep, which finds their results in the cache."""
REFERENCE = "lora"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run")
    command.add_argument("folder", type=Path)
    command.add_argument("--steps", type=int, default=100)
    command.add_argument("--rows", type=int, default=200, help="held-out rows; all are answered")
    command.add_argument("--train-rows", type=int, default=5000)
    command.add_argument("--share", type=float, default=0.125, help="of a GPU for each trial; 0 is the CPU")
    command.add_argument("--cpus", type=int, default=2, help="cores of each trial")
    command.add_argument("--left", type=int, default=6, help="trials of a seed that still run as the next one begins")
    command.add_argument("--seconds", type=float, default=1e9)
    command.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="with commas")
    command.add_argument("--methods", help="some of the file's, with commas")
    command.add_argument("--set", dest="overrides", action="append", default=[])
    command = commands.add_parser("table")
    command.add_argument("folder", type=Path)
    command.add_argument("out", type=Path)
    command = commands.add_parser("markdown")
    command.add_argument("out", type=Path)
    options = parser.parse_args()
    if options.command == "run":
        run(options)
    elif options.command == "table":
        write(options.out, table(options.folder))
    else:
        print(markdown(json.loads(options.out.read_text(encoding="utf-8"))))


def run(options: argparse.Namespace) -> None:
    """Sweep all seeds; the log of each lies beside its folder."""
    begin = time.perf_counter()
    methods = yaml_text.parse(yaml_text.read(SPACE), str(SPACE))["method"]["grid"]
    methods = [method for method in methods if not options.methods or method["name"] in options.methods.split(",")]
    options.folder.mkdir(parents=True, exist_ok=True)
    _warm_up(methods, options)
    running: list[subprocess.Popen[bytes]] = []
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for place, seed in enumerate(seeds):
        running.append(_sweep(seed, methods, options))
        enough = len(methods) - options.left if place < len(seeds) - 1 else len(methods)
        while running[-1].poll() is None and _rows(options.folder, seed) < enough:
            if time.perf_counter() - begin > options.seconds:
                break
            time.sleep(0.5)
        if time.perf_counter() - begin > options.seconds:
            break
    while any(sweep.poll() is None for sweep in running) and time.perf_counter() - begin < options.seconds:
        time.sleep(0.5)
    for sweep in running:
        if sweep.poll() is None:
            sweep.send_signal(signal.SIGTERM)  # which ends it as Ctrl-C does
    print([sweep.wait() for sweep in running], round(time.perf_counter() - begin, 1), "s", flush=True)


def _warm_up(methods: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    parts = [methods[place::WARM_UPS] for place in range(WARM_UPS)] if options.share else []
    plans = [
        subprocess.Popen(
            [*_command("plan", part, options), "--gpu", "NVIDIA H200"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for part in parts
    ]
    for plan in plans:
        plan.wait()


def _sweep(seed: int, methods: Sequence[dict[str, Any]], options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Start the trials of a seed; the untouched base is scored with the first."""
    chosen = [{"name": "none"}, *methods] if seed == SEEDS[0] else methods
    folder = options.folder / f"seed_{seed}"
    command = [
        *_command("sweep", chosen, options), "--set", f"seed={seed}", "--out", str(folder),
        "--tracking-uri", f"sqlite:///{options.folder.absolute()}/seed_{seed}.db",
    ]  # fmt: skip
    with (options.folder / f"seed_{seed}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"COLUMNS": "120"})


def _command(verb: str, methods: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[str]:
    source = "data.sources.0"
    settings = [
        f"method={json.dumps({'grid': list(methods)})}", "train.epochs=null", f"train.steps={options.steps}",
        "train.eval_every=null", f"{source}.train={options.train_rows}", f"{source}.test={options.rows}",
        "evaluation.max_new_tokens=128", "evaluation.general_text=true", "evaluation.samples=0",
        f"resources.gpus_per_worker={options.share}", f"resources.cpus_per_worker={options.cpus}", *options.overrides,
    ]  # fmt: skip
    return [sys.executable, "-m", "ray_peft", verb, str(SPACE), *(f"--set={setting}" for setting in settings)]


def _rows(folder: Path, seed: int) -> int:
    results = folder / f"seed_{seed}" / "results.jsonl"
    return len(results.read_bytes().splitlines()) if results.is_file() else 0


Scored: TypeAlias = tuple[Statistics, TrialResult]
"""A trial's row, with what its held-out rows add to the scores."""


def table(folder: Path) -> dict[str, Any]:
    """Every method's scores over its seeds with 95 % intervals, and what it took."""
    rows: list[Scored] = []
    for seed_folder in sorted(folder.glob("seed_*/")):
        if (seed_folder / "results.jsonl").is_file():
            material = read_material(seed_folder)
            statistics = Statistics(material.answers, material.losses, material.loss_tokens)
            rows += [(statistics, row) for row in material.results]
    by_method: dict[str, list[Scored]] = {}
    for statistics, row in rows:
        by_method.setdefault(row.spec.method.name, []).append((statistics, row))
    spec = rows[0][1].spec
    sources = [{**source.plain(), "path": Path(source.path).name} for source in spec.data.sources]
    base = next((row for _, row in by_method.pop("none", []) if row.status == "finished"), None)
    finished = {
        name: [entry for entry in entries if entry[1].status == "finished"] for name, entries in by_method.items()
    }
    lines = [_line(finished[name], finished.get(REFERENCE, []), base) for name in finished if finished[name]]
    return {
        "space": SPACE.name,
        "model": Path(spec.model.name).name,
        "train": spec.train.plain(),
        "data": {**spec.data.plain(), "sources": sources},
        "evaluation": spec.evaluation.plain(),
        "share_of_gpu": spec.resources.gpus_per_worker,
        "base": None if base is None else base.scores.plain(),
        "methods": sorted(lines, key=lambda line: line["eval_loss"]["mean"]),
        "without_a_score": [
            {"method": row.spec.method.name, "seed": row.spec.seed, "status": row.status, "error": row.error}
            for _, row in rows
            if row.status != "finished"
        ],
    }  # fmt: skip


def _line(entries: Sequence[Scored], reference: Sequence[Scored], base: TrialResult | None) -> dict[str, Any]:
    results = [row for _, row in entries]
    first = results[0]
    line: dict[str, Any] = {
        "method": first.spec.method.plain(),
        "seeds": [row.spec.seed for row in results],
        "trained_parameters": first.trainable_parameters,
        "adapter_bytes": first.adapter_bytes,
        "passes": sorted({row.passes for row in results}),
        "eval_loss": _score(entries, reference, Statistics.loss_parts, [row.scores.eval_loss for row in results]),
        "rouge_l": _score(entries, reference, _rouge, [row.scores.rouge_l for row in results]),
        "general_loss": _over_seeds([row.scores.general_loss for row in results]),
        "forgotten": None,
        "peak_allocated_gib": [row.usage.peak_allocated_gib for row in results],
        "peak_reserved_gib": [row.usage.peak_reserved_gib for row in results],
        "predicted": first.predicted,
        "train_s": [round(row.usage.train_s, 2) for row in results],
        "evaluate_s": [round(row.usage.evaluate_s, 2) for row in results],
        "wall_time_s": [round(row.usage.wall_time_s, 2) for row in results],
    }
    if base is not None and base.scores.general_loss is not None and line["general_loss"]:
        of_base = base.scores.general_loss
        line["forgotten"] = {name: round(value - of_base, 4) for name, value in line["general_loss"].items()}
    return line


def _score(
    entries: Sequence[Scored],
    reference: Sequence[Scored],
    parts_of: Callable[[Statistics, str], Numbers],
    scores: Sequence[float | None],
) -> dict[str, Any]:
    """Mean over seeds and rows with its interval, and the difference to the reference on the same rows and seeds."""
    by_seed = {row.spec.seed: parts_of(statistics, row.trial_id) for statistics, row in entries}
    others = {
        row.spec.seed: parts_of(statistics, row.trial_id) for statistics, row in reference if row.spec.seed in by_seed
    }
    whole = _mean(list(by_seed.values()))
    over = widened(interval(whole), len(whole), seed_variance([float(parts.mean()) for parts in by_seed.values()]))
    score: dict[str, Any] = {
        **_rounded(over),
        "by_seed": [None if value is None else round(value, 4) for value in scores],
    }
    if others and reference is not entries:
        both = [seed for seed in by_seed if seed in others]
        pair = (_mean([by_seed[seed] for seed in both]), _mean([others[seed] for seed in both]))
        (difference,) = compare([pair])
        by_seed_difference = [float((by_seed[seed] - others[seed]).mean()) for seed in both]
        difference = widened(difference, len(pair[0]), seed_variance(by_seed_difference))
        score["less_" + REFERENCE] = [
            round(value, 4) for value in (difference.difference, difference.low, difference.high)
        ]
    return score


def _mean(parts: Sequence[Numbers]) -> Numbers:
    return mean_parts(sum(parts[1:], start=parts[0]) / len(parts))


def _rouge(statistics: Statistics, trial_id: str) -> Numbers:
    return mean_parts(statistics.rouge(trial_id))


def _over_seeds(scores: Sequence[float | None]) -> dict[str, float] | None:
    """Mean and 95 % interval over seeds alone: of a text of which there is one."""
    known = [score for score in scores if score is not None]
    if not known:
        return None
    return _rounded(interval(mean_parts(known)))


def _rounded(over: ScoreInterval) -> dict[str, float]:
    return {"mean": round(over.score, 4), "low": round(over.low, 4), "high": round(over.high, 4)}


def markdown(result: dict[str, Any]) -> str:
    """The table of the documentation."""
    base = result["base"]
    lines = [
        "| method | lr | trained | held-out loss | less that of LoRA | ROUGE-L | general text | peak [GiB] |",
        "| :--- | ---: | ---: | ---: | :--- | :--- | :--- | ---: |",
        f"| none (the base) | | | {base['eval_loss']:.3f} | | {base['rouge_l']:.3f} | {base['general_loss']:.3f} | |",
    ]
    for line in result["methods"]:
        less = line["eval_loss"].get(f"less_{REFERENCE}") if line["method"]["name"] != REFERENCE else None
        rouge, forgotten = line["rouge_l"], line["forgotten"]
        cells = [
            f"`{line['method']['name']}`",
            f"{line['method']['lr']:.0e}".replace("e-0", "e-"),
            f"{line['trained_parameters']:,}",
            f"{line['eval_loss']['mean']:.3f}",
            f"{less[0]:+.3f} ({less[1]:+.3f} to {less[2]:+.3f})" if less else "",
            f"{rouge['mean']:.3f} ({rouge['low']:.3f} to {rouge['high']:.3f})",
            f"{forgotten['mean']:+.3f} ({forgotten['low']:+.3f} to {forgotten['high']:+.3f})",
            _gib(line["peak_allocated_gib"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gib(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.2f}" if known else "-"


if __name__ == "__main__":
    main()
