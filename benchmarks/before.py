"""Speed of training text and images by one version of this package: run it with another version on PYTHONPATH, too.

    PYTHONPATH=older RAY_PEFT_CONFIGS=configs RAY_PEFT_SD15=sd15 python benchmarks/before.py --out results --name older

RAY_PEFT_CONFIGS names a folder of folders that hold config.json alone, RAY_PEFT_SD15 the configs of Stable Diffusion
1.5; weights are random, of the true shape. Text: Gemma-3-1B LoRA, 8 rows of log-normal length, at most 512 tokens, in
one pass. Images: LoRA of the UNet, one image of 512 px a step. Both versions train with their own defaults; the first
third of the steps is not timed. It runs with versions from 0.1.0 (commit 9c5fccf) on.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import ray_peft

try:
    from ray_peft.engine.gpu_peaks import allocated, restart
except ImportError:  # an older version
    from torch.cuda import max_memory_allocated as allocated
    from torch.cuda import reset_peak_memory_stats as restart

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
"""On the CPU, numbers only show that the script runs."""
ROWS, TOKENS = 8, 512


class Stamps:
    """When steps were logged, with the GPU done, and their losses."""

    def __init__(self) -> None:
        self.moments: list[tuple[int, float]] = []
        self.losses: list[float] = []
        self.begin = time.perf_counter()

    def report(self, metrics: Any, step: int) -> None:
        """Take what a step logs."""
        if DEVICE != "cpu":
            torch.cuda.synchronize()
        self.moments.append((step, time.perf_counter()))
        self.losses.append(float(metrics["train_loss"]))

    def result(self, steps: int) -> dict[str, Any]:
        """Steps a second after the first third, and the peak."""
        first, start = next(moment for moment in self.moments if moment[0] >= max(1, steps // 3))
        last, end = self.moments[-1]
        peak = allocated() / 2**30 if DEVICE != "cpu" else None
        return {
            "steps": steps, "s_per_step": (end - start) / (last - first), "steps_per_s": (last - first) / (end - start),
            "first_step_s": self.moments[0][1] - self.begin, "peak_allocated_gib": peak,
            "losses": [self.losses[0], self.losses[-1]],
        }  # fmt: skip


def reset() -> None:
    """Peaks of what follows."""
    if DEVICE != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        restart()


def text(steps: int) -> dict[str, Any]:
    """Train the language model."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, set_seed

    from ray_peft.spec import TrialSpec
    from ray_peft.tasks.llm_sft import train
    from ray_peft.tasks.llm_sft.model import load_model

    spec: Any = TrialSpec.from_plain(
        {
            "task": "llm_sft",
            "model": {"name": str(Path(os.environ["RAY_PEFT_CONFIGS"]).absolute() / MODEL), "random_weights": True},
            "data": {"sources": [{"recipe": "text", "path": "rows.jsonl", "train": 1, "test": 1}]},
            "method": {"name": "lora", "rank": 16},
            "train": {
                "loss": "all", "steps": steps, "batch_size": ROWS, "micro_batch_size": ROWS, "schedule": "constant",
                "log_every": max(1, steps // 10),
            },
            "evaluation": {"generate": False},
        }
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    lengths = torch.empty(steps * ROWS).log_normal_(4.7, 0.8, generator=draw).round().clamp(16, TOKENS).int().tolist()
    ids = [torch.randint(10, 1000, (length,), generator=draw).tolist() for length in lengths]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])), pad_token="a", eos_token="a"
    )
    set_seed(0)
    model: Any = load_model(spec, DEVICE)
    ((stage, _),) = spec.method.stages(steps)
    model = stage.attach(model)
    reset()
    stamps = Stamps()
    with tempfile.TemporaryDirectory() as work:
        if hasattr(train, "StageJob"):  # of version 0.1.0
            job = train.StageJob(stage, steps, 0, rows, Path(work), DEVICE, stamps.report, lambda: 0.0)
            train.train_stage(spec, job, model, tokenizer)
            passes = "as they are"
        else:
            from ray_peft.engine.member import Job

            job = Job(spec, stage, steps, 0, Path(work), DEVICE, stamps.report, lambda: 0.0)
            passes = train.train_stage(spec, job, rows, model, tokenizer).passes
    return {**stamps.result(steps), "passes": passes, "tokens_a_step": sum(lengths) / steps}


def images(steps: int) -> dict[str, Any]:
    """Train the UNet on random latents."""
    from diffusers import DDPMScheduler
    from transformers import set_seed

    from ray_peft.spec import TrialSpec
    from ray_peft.tasks.text_to_image import latents, model, noise, passes, train

    spec: Any = TrialSpec.from_plain(
        {
            "task": "text_to_image",
            "model": {"name": os.environ["RAY_PEFT_SD15"], "random_weights": True},
            "data": {"path": "none", "test": 1, "resolution": 512},
            "method": {"name": "lora", "rank": 16},
            "train": {"steps": steps, "batch_size": 1, "micro_batch_size": 1, "log_every": max(1, steps // 10)},
        }
    )
    set_seed(0)
    images = latents.Encoded(torch.randn(8, 1, 8, SIDE, SIDE), torch.randn(8, 77, WIDTH), 0)
    ((stage, _),) = spec.method.stages(steps)
    unet = model.load_unet(spec, DEVICE)
    attached = passes.attached(spec, stage, unet)
    draws = noise.Draws(spec, images, 0.18215, DDPMScheduler())
    reset()
    stamps = Stamps()
    with tempfile.TemporaryDirectory() as work:
        if hasattr(train, "StageJob"):
            job = train.StageJob(stage, steps, 0, draws, Path(work), DEVICE, stamps.report, lambda: 0.0)
            train.train_stage(spec, job, attached)
        else:
            from ray_peft.engine.member import Job

            job = Job(spec, stage, steps, 0, Path(work), DEVICE, stamps.report, lambda: 0.0)
            train.train_stage(spec, job, draws, attached)
    return stamps.result(steps)


MODEL, SIDE, WIDTH = "gemma-3-1b-it", 64, 768


def main() -> None:
    """Measure both, and write each as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the version")
    parser.add_argument("--text-steps", type=int, default=40)
    parser.add_argument("--image-steps", type=int, default=300)
    options = parser.parse_args()
    measurements: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if DEVICE != "cpu" else None,
        "package": str(Path(ray_peft.__file__).parent),
    }
    works: dict[str, Callable[[], dict[str, Any]]] = {
        "text": lambda: text(options.text_steps),
        "images": lambda: images(options.image_steps),
    }
    for name, work in works.items():
        try:
            measurements[name] = work()
        except Exception as error:  # a part that fails is a row
            measurements[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-2500:]}
        print(name, json.dumps(measurements[name]), flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"before_{options.name}.json").write_text(
            json.dumps(measurements, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
