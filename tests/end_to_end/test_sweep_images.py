"""A real sweep over images: YAML -> Ray -> a UNet -> images -> MLflow -> report -> an exported pipeline."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_diffusion
import yaml

import ray_peft
from ray_peft.console import Console

METHODS = [
    {"name": "none"},
    {"name": "lora", "rank": {"grid": [2, 4]}, "alpha": 12.0, "lr": 0.02},
    {"name": "qlora", "rank": 4, "lr": 0.02, "compute_dtype": "float32"},
    {"name": "full", "lr": 0.005, "weights": "float32"},
]


@pytest.fixture(scope="module")
def swept(ray_cluster, tiny_painter, paintings, tmp_path_factory):
    """One sweep over the methods that the task has."""
    folder = tmp_path_factory.mktemp("swept_images")
    plain = tiny_diffusion.plain_spec(tiny_painter, paintings, train__steps=3, train__save_dtype="float32")
    plain["resources"]["cpus_per_worker"] = 1
    plain |= {"name": "images", "description": "A test.", "method": {"grid": METHODS}}
    (folder / "images.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    return folder / "images.yaml", ray_peft.sweep(folder / "images.yaml", out=folder / "out", console=Console())


def client(outcome):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=outcome.tracking_uri)


def only(outcome, name):
    return next(result for result in outcome.results if result.spec.method.name == name)


def test_every_trial_finishes_with_scores_speed_and_storage(swept):
    _, outcome = swept
    assert [result.error for result in outcome.results] == [None] * 5
    assert outcome.complete
    rows = [json.loads(line) for line in (outcome.folder / "results.jsonl").read_text().splitlines()]
    assert sorted(row["spec"]["method"]["name"] for row in rows) == ["full", "lora", "lora", "none", "qlora"]
    for row in rows:
        name, scores = row["spec"]["method"]["name"], row["scores"]
        assert (scores["eval_rows"], scores["generated_rows"]) == (2, 1)
        assert all(isinstance(scores[key], float) for key in ("eval_loss", "style_heldout", "style_train"))
        assert set(row["storage"]) == ({"nf4", "float32"} if name == "qlora" else {"float32"})
        if name == "none":
            assert (row["adapter_bytes"], row["usage"]["images_per_s"]) == (0, None)
        else:
            assert row["adapter_bytes"] > 0
            assert row["usage"]["images_per_s"] > 0
            assert row["usage"]["train_images"] == 12
    small, large = sorted(
        result.trainable_parameters for result in outcome.results if result.spec.method.name == "lora"
    )
    assert large == 2 * small


def test_images_lie_in_the_trial_s_folder_and_in_mlflow(swept):
    _, outcome = swept
    for result in outcome.results:
        folder = outcome.folder / "trials" / result.trial_id / "images"
        (image,) = json.loads((folder / "images.json").read_text())
        assert (folder / image["file"]).is_file()
        assert (image["before"] is None) == (result.spec.method.name == "none")
        kept = {item.path for item in client(outcome).list_artifacts(result.mlflow_run_id, "images")}
        assert {"images/grid.png", "images/images.json"} <= kept
        metrics = client(outcome).get_run(result.mlflow_run_id).data.metrics
        assert metrics["eval_loss"] == pytest.approx(result.scores.eval_loss)


def test_the_report_shows_images_and_storage(swept):
    _, outcome = swept
    page = (outcome.folder / "report.html").read_text(encoding="utf-8")
    report = (outcome.folder / "report.md").read_text(encoding="utf-8")
    assert 'src="data:image/' in page
    assert "nf4" in page
    assert "nf4" in report
    for result in outcome.results:
        assert result.trial_id in page
        assert result.trial_id in report


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_an_exported_pipeline_makes_the_image_of_the_trial(swept, tmp_path, method):
    import torch
    from diffusers import StableDiffusionPipeline
    from PIL import Image

    from ray_peft.export import export

    _, outcome = swept
    result = only(outcome, method)
    made = export(
        result.mlflow_run_id, form="merged", dtype="float32", out=tmp_path / "out", tracking_uri=outcome.tracking_uri
    )
    assert made.eval_loss_before == pytest.approx(result.scores.eval_loss, rel=1e-4)
    assert made.eval_loss_after == pytest.approx(made.eval_loss_before, rel=1e-4)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    assert not any("lora" in name for name, _ in pipeline.unet.named_parameters())
    evaluation = result.spec.evaluation
    image = pipeline(
        evaluation.prompts[0], generator=torch.Generator().manual_seed(0), width=64, height=64,
        num_inference_steps=evaluation.inference_steps, guidance_scale=evaluation.guidance_scale,
    ).images[0]  # fmt: skip
    folder = outcome.folder / "trials" / result.trial_id / "images"
    (kept,) = json.loads((folder / "images.json").read_text())
    difference = np.abs(np.asarray(image, float) - np.asarray(Image.open(folder / kept["file"]).convert("RGB"), float))
    assert difference.mean() < 0.5  # of 255
    if kept["before"]:
        before = np.asarray(Image.open(folder / kept["before"]).convert("RGB"), float)
        assert np.abs(np.asarray(image, float) - before).mean() > difference.mean()


def test_an_exported_adapter_loads_into_the_base(swept, tiny_painter, tmp_path):
    from diffusers import StableDiffusionPipeline

    from ray_peft.export import export

    _, outcome = swept
    result = only(outcome, "lora")
    made = export(
        result.mlflow_run_id, form="adapter", dtype="float16", out=tmp_path / "out", tracking_uri=outcome.tracking_uri
    )
    assert made.eval_loss_after == pytest.approx(made.eval_loss_before, rel=1e-3)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_painter, safety_checker=None)
    pipeline.load_lora_weights(str(tmp_path / "out"))
    assert any("lora_B" in name and bool(p.any()) for name, p in pipeline.unet.named_parameters())


def test_the_same_sweep_again_runs_nothing(swept):
    space, outcome = swept
    before = (outcome.folder / "results.jsonl").read_text()
    again = ray_peft.sweep(space, out=outcome.folder)
    assert (outcome.folder / "results.jsonl").read_text() == before
    assert {result.trial_id for result in again.results} == {result.trial_id for result in outcome.results}
