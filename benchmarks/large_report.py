"""How long a report of a large sweep takes and how large it is: generated rows, no model, a CPU, half a minute.

    python benchmarks/large_report.py benchmarks/results/large_report.json [FOLDER]

200 trials of six methods answer 500 rows each. In the first case every trial has its own settings, in the second one
the trials are settings with three seeds each. All answers but those of the base are equally good, so every comparison
ends in a tie, which is the hardest case for an answer in few lines. FOLDER keeps the sweeps, to look at their reports.
"""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

from provenance import write

from ray_peft.metrics.scores import Scores
from ray_peft.metrics.text_scores import bleu4, rouge_l
from ray_peft.report.files import write_report
from ray_peft.spec import TrialSpec
from ray_peft.trial.result import Provenance, TrialResult, Usage

TRIALS, ROWS, STEPS, SAMPLES, GPUS = 200, 500, 300, 8, 4
WORDS = [
    first + last for first, last in product(("ka", "lo", "mi", "nu", "re", "so"), ("ra", "ton", "vel", "pi", "gus"))
]
COSTS = {
    "full": (11.2, 62.0),
    "lora": (7.3, 40.0),
    "qlora": (6.1, 55.0),
    "galore": (9.3, 48.0),
    "qlora_galore": (9.4, 66.0),
}
"""GiB and seconds of training."""
ANSWERED_WELL, BASE_ANSWERED_WELL = 0.6, 0.35
"""Share of words that are right."""


def main(out: Path, folder: Path) -> None:
    """Generate, measure and write."""
    cases = {name: measure(folder / name, seeds) for name, seeds in (("settings", 1), ("seeds", 3))}
    write(out, {"trials": TRIALS, "rows": ROWS, "cases": cases})


def measure(folder: Path, seeds: int) -> dict[str, Any]:
    """The report of a generated sweep: seconds in a process that has imported what it needs, and sizes."""
    generate(folder, seeds)
    start, cpu_start = time.perf_counter(), time.process_time()
    written = {path.name: path for path in write_report(folder)}
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    markdown = written["report.md"].read_text(encoding="utf-8")
    answer = markdown.split("## ")[1].splitlines()
    return {
        "report_s": round(seconds, 2),
        "report_cpu_s": round(cpu_seconds, 2),
        "html_mb": round(written["report.html"].stat().st_size / 1e6, 2),
        "markdown_lines": len(markdown.splitlines()),
        "answer_lines": sum(line.startswith("- ") for line in answer),
        "answer_characters": max(map(len, answer)),
        "plots_mb": round(sum(path.stat().st_size for path in written.values() if path.suffix == ".svg") / 1e6, 2),
    }


def generate(folder: Path, seeds: int) -> None:
    """Write the folder of a sweep as its trials would have left it."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    rows = [(" ".join(rng.choices(WORDS, k=18)), " ".join(rng.choices(WORDS, k=12))) for _ in range(ROWS)]
    busy_until = [0.0] * GPUS
    results = []
    for trial in specs(seeds):
        gpu = busy_until.index(min(busy_until))
        results.append(one_trial(folder, trial, rows, gpu, busy_until[gpu]))
        busy_until[gpu] += results[-1].usage.wall_time_s + rng.uniform(1, 8)
    (folder / "results.jsonl").write_text("".join(json.dumps(result.row()) + "\n" for result in results))
    record = {"name": "large", "description": "Which method?", "planned": [result.trial_id for result in results]}
    (folder / "sweep.json").write_text(json.dumps(record))


def specs(seeds: int) -> list[TrialSpec]:
    """The base, and settings of every method on a grid of learning rates as a program writes them."""
    methods = list(COSTS)
    settings = ((method, 1e-5 * (1 + place // len(methods))) for place, method in enumerate(cycle(methods)))
    trained = ((method, lr, seed) for method, lr in settings for seed in range(seeds))
    return [spec("none", 0, {}), *(spec(method, seed, {"lr": lr}) for method, lr, seed in islice(trained, TRIALS - 1))]


def spec(method: str, seed: int, settings: dict[str, Any]) -> TrialSpec:
    """One trial."""
    return TrialSpec.from_plain(
        {
            "model": {"name": "org/generated"},
            "data": {"sources": [{"recipe": "alpaca", "path": "rows.jsonl", "train": 9000, "test": ROWS}]},
            "method": {
                "name": method,
                **({"qlora": settings, "galore": settings} if method == "qlora_galore" else settings),
            },
            "train": {"steps": STEPS, "log_every": 10, "eval_every": 50},
            "seed": seed,
        }
    )


def one_trial(folder: Path, trial: TrialSpec, rows: list[tuple[str, str]], gpu: int, start_s: float) -> TrialResult:
    """Write a trial's files and return its row."""
    place = folder / "trials" / trial.trial_id
    place.mkdir(parents=True)
    rng = random.Random(trial.trial_id)
    method = trial.method.name
    right = BASE_ANSWERED_WELL if method == "none" else ANSWERED_WELL
    references = [reference for _, reference in rows]
    answers = [
        " ".join(word if rng.random() < right else rng.choice(WORDS) for word in reference.split())
        for reference in references
    ]
    lines(place / "answers.jsonl", [
        {"row": row, "prompt": prompt, "prediction": answer, "reference": reference}
        for row, ((prompt, reference), answer) in enumerate(zip(rows, answers, strict=True))
    ])  # fmt: skip
    lines(place / "samples.jsonl", [
        {"row": row, "source_dataset": "alpaca", "prompt": rows[row][0], "reference": references[row],
         "answer": answers[row]}
        for row in range(SAMPLES)
    ])  # fmt: skip
    gib, train_s = COSTS.get(method, (0.3, 0.0))
    train_s *= rng.uniform(0.97, 1.05)
    if train_s:
        lines(place / "metrics.jsonl", [
            {"step": step, "time_s": step / 7, "train_loss": 1.6 + math.exp(-step / 60) + rng.gauss(0, 0.03)}
            for step in range(10, STEPS + 1, 10)
        ])  # fmt: skip
    moments = [datetime.fromtimestamp(1_800_000_000 + at, UTC).isoformat() for at in (start_s, start_s + train_s + 22)]
    return TrialResult(
        trial_id=trial.trial_id, status="finished", spec=trial, steps=STEPS if train_s else 0,
        scores=Scores(
            eval_loss=1.7 + rng.gauss(0, 0.01), bleu4=bleu4(answers, references), rouge_l=rouge_l(answers, references),
            eval_rows=ROWS, generated_rows=ROWS,
        ),
        usage=Usage(
            peak_allocated_gib=gib, peak_reserved_gib=1.2 * gib, train_s=train_s, evaluate_s=20.0, load_s=2.0,
            wall_time_s=train_s + 22, steps_per_s=STEPS / train_s if train_s else None,
        ),
        provenance=Provenance(
            device="generated", hostname="host", data_key="d", gpu=str(gpu), started_at=moments[0], ended_at=moments[1],
        ),
    )  # fmt: skip


def lines(path: Path, values: list[dict[str, Any]]) -> None:
    """Write a JSON Lines file."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(sys.argv[1]), Path(scratch) / "sweeps")
