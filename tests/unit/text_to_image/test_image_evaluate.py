"""Losses on held-out images and made images: equal for every batch size, exact where the answer is known."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_pipeline_eval as tiny
import torch
from cramped import holds
from PIL import Image

from ray_peft.errors import TrialFailed
from ray_peft.spec.text_to_image import ImageEvaluationSpec
from ray_peft.tasks.base import GeneratedImage
from ray_peft.tasks.image_files import write_images
from ray_peft.tasks.image_grid import CELL, LABEL, grid
from ray_peft.tasks.text_to_image.evaluate import even_timesteps, held_out_losses, make_images

SCALE = 0.18215
PROMPTS = ("a red house", "stars at night")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny.pipeline(tmp_path_factory.mktemp("tokenizer"))


def held_out(images=5):
    generator = torch.Generator().manual_seed(3)
    moments = torch.randn(images, 2, 8, 8, 8, generator=generator)
    return moments, torch.randn(images, 16, 16, generator=generator)


def losses(unet, *, batch_size=4, prediction="epsilon", given=None, **more):
    moments, embeddings = given or held_out()
    settings = {"timesteps": 3, "scaling_factor": SCALE, "device": "cpu", "dtype": torch.float32} | more
    return held_out_losses(
        unet, moments, embeddings, tiny.scheduler(), prediction=prediction, batch_size=batch_size, **settings
    )


class Knowing(torch.nn.Module):
    """Finds out the noise from the latents, which it knows by the first number of their caption."""

    def __init__(self, latents, prediction, off=0.0):
        super().__init__()
        self.latents, self.prediction, self.off = latents, prediction, off

    def forward(self, sample, t, encoder_hidden_states):
        scheduler = tiny.scheduler()
        kept = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        latents = self.latents[encoder_hidden_states[:, 0, 0].long()]
        noise = (sample - kept.sqrt() * latents) / (1 - kept).sqrt()
        answer = noise if self.prediction == "epsilon" else kept.sqrt() * noise - (1 - kept).sqrt() * latents
        return SimpleNamespace(sample=answer + self.off)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_who_knows_the_noise_has_no_loss_and_who_is_off_by_two_has_four(prediction):
    moments, embeddings = held_out()
    embeddings[:, 0, 0] = torch.arange(len(embeddings))
    latents = moments[:, 0, :4] * SCALE
    perfect = losses(Knowing(latents, prediction), prediction=prediction, given=(moments, embeddings))
    assert perfect == pytest.approx([0.0] * 5, abs=1e-6)
    off = losses(Knowing(latents, prediction, off=2.0), prediction=prediction, given=(moments, embeddings))
    assert off == pytest.approx([4.0] * 5, rel=1e-4)


def test_the_loss_of_an_image_does_not_depend_on_the_batch_nor_on_the_images_behind_it():
    unet = tiny.unet()
    one, four, many = (losses(unet, batch_size=size) for size in (1, 4, 100))
    assert one == pytest.approx(four, rel=1e-5)
    assert one == pytest.approx(many, rel=1e-5)
    assert len(set(one)) == 5
    moments, embeddings = held_out()
    assert losses(unet, given=(moments[:2], embeddings[:2])) == pytest.approx(one[:2], rel=1e-5)
    moments[:, 1:] = 7.0  # other views, and the variances, do not count
    moments[:, :, 4:] = 7.0
    assert losses(unet, given=(moments, embeddings)) == pytest.approx(one, rel=1e-5)


def test_where_memory_runs_out_the_losses_are_those_of_smaller_passes():
    unet, lowered = tiny.unet(), {}
    free = losses(unet, batch_size=8)
    with holds(unet, 3) as seen:
        assert losses(unet, batch_size=8, lowered=lowered) == pytest.approx(free, rel=1e-6)
        assert seen == [8, 4, *[2] * 7, 1]  # 15 pairs
        assert lowered == {"evaluation.batch_size": 2}
        assert losses(unet, batch_size=8, lowered=lowered) == pytest.approx(free, rel=1e-6)
        assert max(seen[10:]) == 2, "what was lowered stays so"
    with holds(unet, 0), pytest.raises(torch.OutOfMemoryError):
        losses(unet)


def test_losses_are_taken_without_dropout_inside_the_context_and_leave_the_model_as_it_was():
    unet, opened = tiny.unet().train(), []

    class Seen:
        def __enter__(self):
            opened.append(unet.training)

        def __exit__(self, *error):
            return None

    losses(unet, context=Seen)
    assert opened == [False] * 4  # 15 pairs in batches of 4
    assert unet.training
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_timesteps_are_the_middles_of_equal_parts():
    assert even_timesteps(1, 1000) == [500]
    assert even_timesteps(4, 1000) == [125, 375, 625, 875]
    assert even_timesteps(3, 3) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"timesteps \(4\) must be at most the 3"):
        even_timesteps(4, 3)
    with pytest.raises(ValueError, match="prediction"):
        losses(tiny.unet(), prediction="sample")


def test_images_do_not_depend_on_the_batch(pipeline):
    def made(batch_size, prompts=PROMPTS):
        wanted = ImageEvaluationSpec(prompts=prompts, seeds=(0, 3), inference_steps=2, batch_size=batch_size)
        return make_images(pipeline, wanted, tiny.RESOLUTION)

    one, three = made(1), made(3)
    assert [(image.prompt, image.seed) for image in one] == [(p, s) for p in PROMPTS for s in (0, 3)]
    for first, second in zip(one, three, strict=True):
        assert (first.prompt, first.seed, first.image.size) == (second.prompt, second.seed, (32, 32))
        apart = np.abs(np.asarray(first.image, dtype=int) - np.asarray(second.image, dtype=int))
        assert apart.max() <= 1  # rounding of the last bit
    assert np.asarray(one[0].image).std() > 1
    assert not np.array_equal(np.asarray(one[0].image), np.asarray(one[1].image))
    (alone, _) = made(1, PROMPTS[1:])
    assert np.array_equal(np.asarray(alone.image), np.asarray(one[2].image))
    assert made(2, ()) == []


class Cramped:
    """A pipeline on a device that holds so many images at a time."""

    def __init__(self, pipeline, most):
        self.pipeline, self.most, self.sizes = pipeline, most, []

    def __getattr__(self, name):
        return getattr(self.pipeline, name)

    def __call__(self, **given):
        self.sizes.append(len(given["prompt"]))
        if self.sizes[-1] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.pipeline(**given)


def test_a_batch_that_does_not_fit_is_halved_and_one_image_that_does_not_fit_is_an_error(pipeline, caplog):
    wanted = ImageEvaluationSpec(prompts=PROMPTS, seeds=(0, 1, 2), inference_steps=1, batch_size=5)
    cramped, lowered = Cramped(pipeline, 2), {}
    made = make_images(cramped, wanted, tiny.RESOLUTION, lowered=lowered)
    assert lowered == {"evaluation.batch_size": 2}
    assert [(image.prompt, image.seed) for image in made] == [(p, s) for p in PROMPTS for s in (0, 1, 2)]
    assert cramped.sizes == [5, 2, 2, 2]
    assert "ran out of memory; going on with 2" in caplog.text
    with pytest.raises(torch.OutOfMemoryError):
        make_images(Cramped(pipeline, 0), wanted, tiny.RESOLUTION)


def test_an_image_of_nan_is_an_error_and_not_a_black_picture(pipeline):
    wanted = ImageEvaluationSpec(prompts=PROMPTS[:1], seeds=(4,), inference_steps=1)
    weight = pipeline.unet.conv_out.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(float("nan"))
        with pytest.raises(TrialFailed, match="'a red house' with seed 4 is not finite"):
            make_images(pipeline, wanted, tiny.RESOLUTION)
        with pytest.raises(TrialFailed, match="the model's own weights are, or its dtype") as caught:
            make_images(pipeline, wanted, tiny.RESOLUTION, trained=False)
        assert "method.lr" not in str(caught.value)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_grid_has_a_place_for_every_image():
    small = Image.new("RGB", (64, 64), "red")
    found = grid([[small, None], [small, small]], ["a prompt of some words " * 4, "short"], ["one", "two"])
    assert found.width == LABEL + 2 * (64 + 8)
    assert found.height > 2 * 64
    values = np.asarray(found)
    red = (values == (255, 0, 0)).all(axis=2)
    assert red.sum() == 3 * 64 * 64
    assert not red[:, :LABEL].any()
    assert (values[:, :LABEL] < 128).any()  # the prompts are written
    large = grid([[Image.new("RGB", (1024, 512))]], [""], ["x"])
    assert large.width == CELL + 8
    # A prompt without spaces is broken, and a long one makes its row higher.
    assert grid([[small]], ["x" * 400], ["x"]).height > 64 + 100


def test_files_of_a_trial(tmp_path):
    def image(prompt, seed, before):
        return GeneratedImage(
            prompt, seed, tiny.picture(seed), tiny.picture(9) if before else None, "vg_001.jpg", 0.5 + seed
        )

    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "p07_s0.png").write_text("old")
    write_images([image(p, s, True) for p in PROMPTS for s in (0, 3)], folder)
    stems = [f"p{p:02d}_s{s}" for p in (0, 1) for s in (0, 3)]
    names = {f"{stem}{end}.png" for stem in stems for end in ("", "_before")}
    assert {path.name for path in folder.iterdir()} == names | {"grid.png", "images.json"}
    listed = json.loads((folder / "images.json").read_text())
    assert listed[1] == {
        "prompt": PROMPTS[0], "seed": 3, "file": "p00_s3.png", "before": "p00_s3_before.png",
        "nearest": "vg_001.jpg", "nearest_likeness": 3.5,
    }  # fmt: skip
    assert np.array_equal(np.asarray(Image.open(folder / "p00_s3.png")), np.asarray(tiny.picture(3)))
    assert Image.open(folder / "grid.png").width == LABEL + 4 * (32 + 8)
    write_images([image(PROMPTS[0], 0, False)], folder)
    assert {path.name for path in folder.iterdir()} == {"p00_s0.png", "grid.png", "images.json"}
    assert Image.open(folder / "grid.png").width == LABEL + 32 + 8
    assert json.loads((folder / "images.json").read_text())[0]["before"] is None
