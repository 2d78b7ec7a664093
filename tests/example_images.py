"""The folder of a finished text_to_image sweep, written by hand: six trials with losses, pictures and scores."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from ray_peft.metrics.scores import Scores
from ray_peft.spec import TrialSpec
from ray_peft.tasks.base import GeneratedImage
from ray_peft.tasks.image_files import write_images
from ray_peft.trial.result import Provenance, TrialResult, Usage

PROMPTS = ("a wheat field with <b>crows</b> | and `sky`", "a portrait of a man with a straw hat")
SEEDS = (0, 7)
HELD_OUT = 12
KINDS: dict[str, dict[str, Any]] = {
    # held-out loss, style, nearest painting, GiB, images/s, colour of the pictures
    "none": {"loss": 0.150, "style": 0.71, "nearest": 0.12, "gib": 4.2, "speed": None, "colour": (90, 90, 160)},
    "full": {"loss": 0.139, "style": 0.86, "nearest": 0.31, "gib": 15.1, "speed": 20.1, "colour": (200, 160, 40)},
    "lora": {"loss": 0.140, "style": 0.84, "nearest": 0.21, "gib": 5.3, "speed": 26.0, "colour": (220, 180, 60)},
    "qlora": {"loss": 0.142, "style": 0.83, "nearest": 0.20, "gib": 4.9, "speed": 19.3, "colour": (210, 170, 80)},
}


def spec(method: str, seed: int = 42, **more: Any) -> TrialSpec:
    return TrialSpec.from_plain(
        {
            "task": "text_to_image",
            "model": {"name": "org/tiny-diffusion"},
            "data": {"path": "/data/paintings", "test": HELD_OUT},
            "method": {"name": method},
            "train": {"steps": 200, "batch_size": 4},
            "evaluation": {"prompts": list(PROMPTS), "seeds": list(SEEDS)},
            "seed": seed,
        }
        | more
    )


def losses(method: str, seed: int = 42) -> list[float]:
    """Of each held-out image: its own difficulty, shared by all, and what the method changes of it."""
    shared, of_method = random.Random("images"), random.Random(f"{method} {seed}")
    mean = float(KINDS[method]["loss"])
    return [mean + shared.gauss(0, 0.04) + of_method.gauss(0, 0.001) for _ in range(HELD_OUT)]


def build(
    folder: Path, *, methods: tuple[str, ...] = tuple(KINDS), seeds: tuple[int, ...] = (42,), before: bool = True
) -> Path:
    """One trial for each method and seed; of the last trial the pictures lie beside those of the base."""
    results = [_trial(folder, method, seed, before=before) for method in methods for seed in seeds]
    (folder / "results.jsonl").write_text("".join(json.dumps(result.row()) + "\n" for result in results))
    record = {"name": "van_gogh", "description": "Which adapter?", "planned": [result.trial_id for result in results]}
    (folder / "sweep.json").write_text(json.dumps(record))
    return folder


def _trial(folder: Path, method: str, seed: int, *, before: bool) -> TrialResult:
    kind, trial = KINDS[method], spec(method, seed)
    place = folder / "trials" / trial.trial_id
    place.mkdir(parents=True)
    image_losses = losses(method, seed)
    (place / "losses.jsonl").write_text(
        "".join(json.dumps({"row": i, "loss": x}) + "\n" for i, x in enumerate(image_losses))
    )
    for name in ("answers", "samples"):
        (place / f"{name}.jsonl").write_text("")
    write_images(_images(method, kind, before=before), place / "images")
    speed = kind["speed"]
    storage = {"nf4": 130_000_000, "bfloat16": 1_180_000_000} if method == "qlora" else {"bfloat16": 1_720_000_000}
    return TrialResult(
        trial_id=trial.trial_id, status="finished", spec=trial,
        scores=Scores(
            eval_loss=sum(image_losses) / len(image_losses),
            style_heldout=kind["style"], style_train=kind["style"] + 0.01,
            nearest_train=kind["nearest"], eval_rows=HELD_OUT, generated_rows=len(PROMPTS) * len(SEEDS),
        ),
        usage=Usage(
            peak_allocated_gib=kind["gib"], peak_reserved_gib=kind["gib"] * 1.2, load_s=9.0, evaluate_s=40.0,
            train_s=800 / speed if speed else 0.0, wall_time_s=60 + (800 / speed if speed else 0.0),
            images_per_s=speed, steps_per_s=speed / 4 if speed else None, train_images=800 if speed else 0,
        ),
        train_loss_final=0.13 if speed else None, steps=200 if speed else 0,
        trainable_parameters=3_188_736 if "lora" in method else 859_520_964 if method == "full" else 0,
        total_parameters=862_709_700, adapter_bytes=6_400_000 if speed else 0, storage=storage,
        provenance=Provenance(device="NVIDIA H200", data_key="d"),
    )  # fmt: skip


def _images(method: str, kind: dict[str, Any], *, before: bool) -> list[GeneratedImage]:
    red, green, blue = kind["colour"]
    base = KINDS["none"]["colour"]
    return [
        GeneratedImage(
            prompt=prompt, seed=seed,
            after=Image.radial_gradient("L").convert("RGB").resize((512, 512)).point(
                [min(255, level * part // 128 + 10 * seed) for part in (red, green, blue) for level in range(256)]
            ),
            before=Image.new("RGB", (512, 512), base) if before and method != "none" else None,
            nearest=f"vg_{seed:03d}.jpg", nearest_likeness=kind["nearest"] + 0.01 * seed,
        )
        for prompt in PROMPTS for seed in SEEDS
    ]  # fmt: skip
