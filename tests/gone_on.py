"""A trial that is stopped and goes on, and how it is compared with one that nobody stopped.

Run as a script, it is one of two data-parallel workers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_diffusion
from safetensors.torch import load_file
from untracked import HYBRID, Notes

from ray_peft.spec import TrialSpec
from ray_peft.trial import trial
from ray_peft.trial.result import TrialResult

LORA = {"name": "lora", "rank": 4, "lr": 0.01}
QLORA = {"name": "qlora", "rank": 4, "lr": 0.01, "compute_dtype": "float32"}
FULL = {"name": "full", "lr": 0.003, "weights": "float32"}
GALORE = {"name": "galore", "rank": 4, "lr": 0.01, "update_proj_gap": 4, "weights": "float32"}
CASES = {
    "lora": ("llm_sft", LORA, {}),
    "lora-dropout": ("llm_sft", LORA | {"dropout": 0.2}, {}),
    "qlora": ("llm_sft", QLORA | {"dropout": 0.1}, {}),
    "full": ("llm_sft", FULL, {}),
    "full-bfloat16": ("llm_sft", {"name": "full", "lr": 0.003}, {}),
    "galore": ("llm_sft", GALORE, {}),
    "galore-bfloat16": ("llm_sft", GALORE | {"weights": "bfloat16"}, {}),
    "galore-8bit": ("llm_sft", GALORE | {"weights": "bfloat16", "moments": "8bit"}, {}),
    "galore-exact": ("llm_sft", GALORE | {"svd": "exact"}, {}),
    "galore-host": ("llm_sft", GALORE | {"weights": "bfloat16", "gradients": "host"}, {}),
    "galore-layerwise": (
        "llm_sft",
        GALORE | {"layerwise": True, "max_grad_norm": None},
        {"train__micro_batch_size": 8},
    ),
    "hybrid": ("llm_sft", HYBRID, {}),
    "images-lora": ("text_to_image", LORA, {"train__ema_decay": 0.9}),
    "images-dropout": ("text_to_image", LORA | {"dropout": 0.2}, {}),
    "images-qlora": ("text_to_image", QLORA, {}),
    "images-full": ("text_to_image", FULL, {"train__ema_decay": 0.9}),
}
STEPS = 12
SCHEDULE = {"train__steps": STEPS, "train__log_every": 2, "train__eval_every": 4, "train__warmup_steps": 3}


def case_spec(case, text, images, **changes):
    """One of `CASES`; `text` and `images` are the model and the data of each task."""
    task, method, more = CASES[case]
    more = {**SCHEDULE, **more, **changes}
    if task == "llm_sft":
        return TrialSpec.from_plain(tiny.plain_spec(*text, method, evaluation__generate=False, **more))
    return TrialSpec.from_plain(tiny_diffusion.plain_spec(*images, method, evaluation__prompts=[], **more))


class Curves(Notes):
    """A tracker that keeps the points of its run."""

    def __init__(self):
        super().__init__()
        self.points = []

    def log(self, metrics, step):
        self.points += [(step, name, value) for name, value in metrics.items()]


def attempt(spec, folder, stop_at=None, device="cpu", **place):
    """One attempt, stopped where the loss of step `stop_at` is logged."""
    tracker = Curves()

    def progress(metrics, step):
        if "train_loss" in metrics and step == stop_at:
            raise KeyboardInterrupt

    row = trial.run(spec, trial.Place(folder, device, **place), tracker, progress)
    return row, tracker.points


def logged(folder):
    """The points in metrics.jsonl, and whether its clock goes on."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [line["time_s"] for line in lines]
    assert times == sorted(times)
    return [(line["step"], name, line[name]) for line in lines for name in line if name not in ("step", "time_s")]


def assert_same_points(points, expected):
    assert [point[:2] for point in points] == [point[:2] for point in expected]
    assert [value for *_, value in points] == pytest.approx([value for *_, value in expected], rel=1e-6, abs=1e-9)


def assert_same_trial(folder, row, points, whole):
    """All that a row says of the numbers of training and scores, the curve with the tracker, and what was trained."""
    expected_folder, expected, expected_points = whole
    assert row.status == "finished"
    assert_same_points(points, expected_points)
    assert_same_points(logged(folder), expected_points)
    usage, expected_usage = row.usage, expected.usage
    assert (usage.train_tokens, usage.train_images) == (expected_usage.train_tokens, expected_usage.train_images)
    assert usage.complete
    exact = ("steps", "trainable_parameters", "total_parameters", "adapter_bytes", "passes", "lowered", "storage")
    assert [getattr(row, name) for name in exact] == [getattr(expected, name) for name in exact]
    for name in ("train_loss_final", "eval_loss_best", "boundary_losses"):
        assert getattr(row, name) == pytest.approx(getattr(expected, name), rel=1e-6)
    numbers = {name: value for name, value in row.scores.plain().items() if isinstance(value, float)}
    assert numbers == pytest.approx({name: expected.scores.plain()[name] for name in numbers}, rel=1e-6)
    for file in [*expected_folder.glob("adapter/*.safetensors")]:
        weights, expected_weights = load_file(folder / "adapter" / file.name), load_file(file)
        assert weights.keys() == expected_weights.keys()
        for name, weight in weights.items():
            assert weight.float() == pytest.approx(expected_weights[name].float(), rel=1e-5, abs=1e-7), name
    assert [path.name for path in folder.iterdir() if path.name in ("stage1", "stage2")] == []


def unheard(metrics, step):
    """A report that nobody hears; a process of its own can import it."""


def by_two_workers(spec, folder, stop_at):
    """An undisturbed trial of two workers, and one that is stopped and goes on: their rows."""
    (folder / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command += [str(folder), str(stop_at)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    names = ("undisturbed", "stopped")
    rows = [(folder / name / trial.RESULT_FILE).read_text(encoding="utf-8") for name in names]
    return [TrialResult.model_validate_json(row) for row in rows]


def _work(folder, stop_at):
    """What each of the two workers does."""
    import torch

    torch.distributed.init_process_group("gloo")
    spec = TrialSpec.from_plain(json.loads((folder / "spec.json").read_text(encoding="utf-8")))
    workers = {"rank": torch.distributed.get_rank(), "num_workers": 2}
    attempt(spec, folder / "undisturbed", **workers)
    torch.distributed.barrier()
    try:
        attempt(spec, folder / "stopped", stop_at, **workers)
    except KeyboardInterrupt:
        torch.distributed.barrier()
    attempt(spec, folder / "stopped", **workers)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _work(Path(sys.argv[1]), int(sys.argv[2]))
