"""The folder of a finished sweep with all that a report can hold; written by hand, so nothing was trained."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from ray_peft.metrics.scores import Scores
from ray_peft.metrics.text_scores import bleu4, rouge_l
from ray_peft.spec import TrialSpec
from ray_peft.trial.result import Provenance, TrialResult, Usage

STEPS = 300
WORDS = [
    f"{first}{last}" for first in ("ka", "lo", "mi", "nu", "re", "so") for last in ("ra", "ton", "vel", "pi", "gus")
]
HOSTILE = "<script>alert('x')</script> </pre> & \"quoted\" $x$ | `code`"
PARAMETERS = 134_515_008
KINDS: dict[str, dict[str, Any]] = {
    # share of words that are right, end of the training loss, GiB, seconds, trained parameters, arithmetic
    "none": {"right": 0.35, "loss": 2.6, "gib": 0.25, "train_s": 0.0, "trained": 0, "arithmetic": ""},
    "full": {"right": 0.6, "loss": 1.6, "gib": 11.2, "train_s": 31.0, "trained": PARAMETERS, "arithmetic": "float32"},
    "lora": {"right": 0.6, "loss": 1.7, "gib": 7.3, "train_s": 39.7, "trained": 4_884_480, "arithmetic": "float32"},
    "qlora": {"right": 0.52, "loss": 1.8, "gib": 6.1, "train_s": 38.8, "trained": 4_884_480, "arithmetic": "bfloat16"},
    "galore": {
        "right": 0.59, "loss": 1.66, "gib": 9.28, "train_s": 26.6, "trained": PARAMETERS,
        "arithmetic": "bfloat16 weights, stochastic rounding",
    },
    "qlora_galore": {
        "right": 0.55, "loss": 1.72, "gib": 9.4, "train_s": 44.0, "trained": PARAMETERS, "arithmetic": "bfloat16",
    },
}  # fmt: skip


def spec(method: str, seed: int, **method_settings: Any) -> TrialSpec:
    return TrialSpec.from_plain(
        {
            "model": {"name": "org/tiny"},
            "data": {"sources": [{"recipe": "alpaca", "path": "a.jsonl", "train": 900, "validation": 40, "test": 60}]},
            "method": {"name": method, **method_settings},
            "train": {"steps": STEPS, "log_every": 10, "eval_every": 50},
            "seed": seed,
        }
    )


def build(folder: Path, *, seeds: tuple[int, ...] = (1, 2), rows: int = 60) -> Path:
    """Six methods with each seed; of galore the last seed failed, and full with batches of one ran out of memory."""
    folder.mkdir(exist_ok=True)
    rng = random.Random(0)
    references = [" ".join(rng.choices(WORDS, k=12)) for _ in range(rows)]
    results = []
    for method, kind in KINDS.items():
        for seed in seeds:
            failed = method == "galore" and len(seeds) > 1 and seed == seeds[-1]
            results.append(_trial(folder, method, kind, seed, references, failed=failed))
    large = spec("lora", seeds[0], rank=512)
    results.append(
        TrialResult(
            trial_id=large.trial_id, status="out_of_memory", spec=large, error="CUDA out of memory\nTraceback",
            usage=Usage(peak_allocated_gib=22.5, peak_reserved_gib=23.1, train_s=1.0, wall_time_s=9.0),
        )
    )  # fmt: skip
    results.append(_ensemble(folder, results, references, seeds[0]))
    (folder / "results.jsonl").write_text("".join(json.dumps(result.row()) + "\n" for result in results))
    record = {
        "name": "which_method",
        "description": "Which method?",
        "notes": ["alpaca: 960 of 1000 rows read"],
        "planned": [*(result.trial_id for result in results), "galore-notrun1"],
        "tracking_uri": "",
    }
    (folder / "sweep.json").write_text(json.dumps(record))
    return folder


def _trial(
    folder: Path, method: str, kind: dict[str, Any], seed: int, references: list[str], *, failed: bool
) -> TrialResult:
    trial = spec(method, seed)
    place = folder / "trials" / trial.trial_id
    place.mkdir(parents=True)
    rng = random.Random(f"{method} {seed}" if method != "none" else "none")
    answers = [
        " ".join(word if rng.random() < kind["right"] else rng.choice(WORDS) for word in text.split())
        for text in references
    ]
    _log(place / "metrics.jsonl", kind, rng, method, until=STEPS // 2 if failed else STEPS)
    common: dict[str, Any] = {"trial_id": trial.trial_id, "spec": trial, "arithmetic": kind["arithmetic"]}
    if failed:
        return TrialResult(**common, status="failed", error="RuntimeError: non-finite loss\nTraceback", steps=150)
    _write_answers(place, answers, references)
    train_s = kind["train_s"] * (1 + 0.03 * seed)
    return TrialResult(
        **common,
        status="finished",
        scores=Scores(
            eval_loss=kind["loss"] + 0.05 + 0.01 * seed, bleu4=bleu4(answers, references),
            rouge_l=rouge_l(answers, references), eval_rows=len(references), generated_rows=len(references),
        ),
        usage=Usage(
            peak_allocated_gib=kind["gib"] + 0.05 * seed, peak_reserved_gib=kind["gib"] * 1.3, load_s=2.0,
            train_s=train_s, evaluate_s=23.0, save_s=0.4, wall_time_s=train_s + 26,
            steps_per_s=STEPS / train_s if train_s else None, tokens_per_s=7000.0 if train_s else None,
        ),
        train_loss_final=kind["loss"] if train_s else None,
        steps=STEPS if train_s else 0,
        boundary_losses={"after stage 1": 1.8056, "after merge 1": 1.8067} if method == "qlora_galore" else {},
        trainable_parameters=kind["trained"],
        total_parameters=PARAMETERS + (4_884_480 if "lora" in method else 0),
        adapter_bytes=2 * kind["trained"] + 50_000 if train_s else 0,
        provenance=Provenance(device="NVIDIA H200", data_key="d", started_at=f"2026-01-0{seed}T00:00:00Z"),
    )  # fmt: skip


def _ensemble(folder: Path, results: list[TrialResult], references: list[str], seed: int) -> TrialResult:
    """LoRA and full tuning together; its row holds what its members cost."""
    members = {
        result.spec.method.name: result
        for result in results
        if result.spec.method.name in ("lora", "full") and result.spec.seed == seed and result.status == "finished"
    }
    trial = spec("ensemble", seed, members=[{"method": members[name].spec.method.plain()} for name in ("lora", "full")])
    assert [member.trial_id for member in trial.members()] == [members[name].trial_id for name in ("lora", "full")]
    place = folder / "trials" / trial.trial_id
    place.mkdir()
    rng = random.Random("ensemble")
    answers = [" ".join(w if rng.random() < 0.68 else rng.choice(WORDS) for w in text.split()) for text in references]
    _write_answers(place, answers, references)
    train_s = sum(member.usage.train_s for member in members.values())
    return TrialResult(
        trial_id=trial.trial_id, status="finished", spec=trial, arithmetic="that of each member",
        members={members["lora"].trial_id: 0.6, members["full"].trial_id: 0.4},
        scores=Scores(eval_loss=1.6, bleu4=bleu4(answers, references), rouge_l=rouge_l(answers, references)),
        usage=Usage(
            peak_allocated_gib=max(member.usage.peak_allocated_gib or 0 for member in members.values()),
            train_s=train_s, evaluate_s=40.0, wall_time_s=43.0,
        ),
        trainable_parameters=sum(member.trainable_parameters for member in members.values()),
        adapter_bytes=sum(member.adapter_bytes for member in members.values()),
        provenance=Provenance(device="NVIDIA H200", data_key="d"),
    )  # fmt: skip


def _log(path: Path, kind: dict[str, Any], rng: random.Random, method: str, *, until: int) -> None:
    lines: list[dict[str, Any]] = []
    if kind["train_s"]:
        for step in range(10, until + 1, 10):
            loss = kind["loss"] + math.exp(-step / 60) + rng.gauss(0, 0.03)
            lines.append({"step": step, "time_s": step / 7, "train_loss": loss, "grad_norm": 1.0, "lr": 1e-4})
            if step % 50 == 0:
                held_out = kind["loss"] + 0.1 + math.exp(-step / 60)
                lines.append({"step": step, "time_s": step / 7, "eval_loss": held_out})
            if method == "qlora_galore" and step == 200:
                lines.append({"step": step, "time_s": step / 7, "boundary_loss.after_stage_1": 1.8056})
                lines.append({"step": step, "time_s": step / 7, "boundary_loss.after_merge_1": 1.8067})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_answers(place: Path, answers: list[str], references: list[str]) -> None:
    (place / "answers.jsonl").write_text(
        "".join(
            json.dumps({"row": row, "prediction": prediction, "reference": reference}) + "\n"
            for row, (prediction, reference) in enumerate(zip(answers, references, strict=True))
        )
    )
    samples = [
        {"row": row, "source_dataset": "alpaca", "prompt": f"Say row {row} again.\n\nInput: {references[row]}",
         "reference": references[row], "answer": f"{answers[row]}\n{HOSTILE}" if row == 0 else answers[row]}
        for row in range(min(4, len(references)))
    ]  # fmt: skip
    (place / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
