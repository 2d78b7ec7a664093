"""What a trial that makes images leaves: files, artifacts, scores and speeds in its row and in its metrics."""

from __future__ import annotations

import json
from dataclasses import replace

import example_images
import pytest
import tiny_pipeline_eval as tiny

from ray_peft.engine.trained import Trained
from ray_peft.errors import TrialFailed
from ray_peft.metrics.scores import Scores
from ray_peft.store.tracking.rows import final_metrics
from ray_peft.tasks.base import GeneratedImage, Scored
from ray_peft.trial.life import Life, Place, evaluate
from ray_peft.trial.stages import train_all


class Painter:
    """A bench that has scored already."""

    def __init__(self, scored):
        self.scored = scored

    def evaluate(self):
        return self.scored

    def illustrate(self, scored):
        return scored

    def benchmark(self, scores):
        return scores

    def attach(self, stage):
        pass

    merge = attach

    def parameters(self):
        return (3, 10)

    def eval_loss(self):
        return 0.5

    def train(self, stage, steps, first_step, folder, report):
        return Trained(steps=steps, images=4 * steps, seconds=2.0, timed_steps=steps)


class Kept:
    """A tracker that notes names."""

    def __init__(self):
        self.artifacts, self.tables = [], []

    def artifact(self, path, folder, *, remove=False):
        assert path.exists()
        self.artifacts.append((path.name, folder))

    def table(self, rows, name):
        self.tables.append(name)

    def log(self, metrics, step):
        pass


def life(tmp_path, tracker=None):
    return Life(example_images.spec("lora"), Place(tmp_path, "cpu"), tracker, lambda metrics, step: None)


SCORED = Scored(
    Scores(eval_loss=0.5, style_heldout=0.8, style_train=0.9, nearest_train=0.3, eval_rows=2, generated_rows=2),
    images=[GeneratedImage("a", seed, tiny.picture(seed), tiny.picture(5)) for seed in (0, 1)],
    losses=[0.25, 0.75],
)


def test_files_and_artifacts_of_an_evaluation(tmp_path):
    tracker = Kept()
    evaluate(life(tmp_path, tracker), Painter(SCORED))
    assert (tmp_path / "losses.jsonl").read_text() == '{"row": 0, "loss": 0.25}\n{"row": 1, "loss": 0.75}\n'
    assert len(json.loads((tmp_path / "images" / "images.json").read_text())) == 2
    assert (tmp_path / "images" / "grid.png").is_file()
    assert tracker.artifacts == [("losses.jsonl", "evaluation"), ("images", "images")]
    assert tracker.tables == []


def test_an_evaluation_without_images_and_losses_writes_neither(tmp_path):
    tracker = Kept()
    evaluate(life(tmp_path, tracker), Painter(replace(SCORED, images=[], losses=[])))
    assert {path.name for path in tmp_path.iterdir()} == {"answers.jsonl", "samples.jsonl", "metrics.jsonl"}
    assert tracker.artifacts == []


def test_a_loss_that_is_no_number_fails_the_trial(tmp_path):
    with pytest.raises(TrialFailed, match="held-out loss is nan"):
        evaluate(life(tmp_path), Painter(replace(SCORED, scores=Scores(eval_loss=float("nan")))))


def test_the_speed_in_images_is_that_of_all_stages(tmp_path):
    lived = life(tmp_path)
    lived.process.memory.start = lived.process.memory.stop = lambda: None
    stage = lived.spec.method
    train_all(lived, Painter(SCORED), [(stage, 5)])
    lived.storage = {"nf4": 100}
    evaluate(lived, Painter(SCORED))
    result = lived.result("finished")
    assert (result.usage.train_images, result.usage.images_per_s, result.usage.steps_per_s) == (20, 10.0, 2.5)
    assert result.usage.tokens_per_s is None
    assert result.storage == {"nf4": 100}
    metrics = final_metrics(result)
    assert metrics["scores.style_heldout"] == 0.8
    assert metrics["scores.nearest_train"] == 0.3
    assert metrics["usage.images_per_s"] == 10.0
    assert metrics["usage.train_images"] == 20
    assert "usage.tokens_per_s" not in metrics
    assert metrics["storage.nf4"] == 100
