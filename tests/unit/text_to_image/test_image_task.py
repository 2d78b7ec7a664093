"""From a folder to scores, images and an exported pipeline; what cannot be trained is one line with a way out."""

from __future__ import annotations

import contextlib
import json
import shutil

import numpy as np
import pytest
import tiny_diffusion
from cramped import holds
from PIL import Image
from untracked import run

from ray_peft.checks.trials import inspect_trials
from ray_peft.console import Console
from ray_peft.errors import ModelError
from ray_peft.spec import ModelSpec, TrialSpec
from ray_peft.tasks.text_to_image import images
from ray_peft.tasks.text_to_image.model import fingerprint
from ray_peft.tasks.text_to_image.task import TextToImage

LORA = {"name": "lora", "rank": 4, "alpha": 12.0, "lr": 0.05}
FULL = {"name": "full", "lr": 0.01, "weights": "float32"}


def numbers(image):
    return np.asarray(image, dtype=np.float32)


def broken(tiny_painter, folder, change):
    """A copy of the pipeline that `change` did something to."""
    shutil.copytree(tiny_painter, folder)
    change(folder)
    return folder


def edit(file, **values):
    plain = json.loads(file.read_text())
    file.write_text(json.dumps(plain | values))


def test_an_inspection_counts_images_and_notes_captions_that_are_cut(tiny_painter, paintings, tmp_path):
    found = TextToImage().inspect(TrialSpec.from_plain(tiny_diffusion.plain_spec(tiny_painter, paintings)))
    assert found.train_rows == 6
    assert not any("captions are cut" in note for note in found.notes)
    long = tmp_path / "long"
    shutil.copytree(paintings, long)
    rows = [json.loads(line) for line in (long / "metadata.jsonl").read_text().splitlines()]
    text = "\n".join(json.dumps(row | {"text": row["text"] + " swirl" * 90}) for row in rows)
    (long / "metadata.jsonl").write_text(text + "\n")
    other = TextToImage().inspect(TrialSpec.from_plain(tiny_diffusion.plain_spec(tiny_painter, long)))
    assert any(note.startswith("6 training captions are cut to 77 tokens") for note in other.notes)
    assert other.data_key != found.data_key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json; give the folder of a diff"),
        (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json is not JSON"),
        (
            lambda folder: edit(folder / "model_index.json", unet=["diffusers", "FluxTransformer2DModel"]),
            "has FluxTransformer2DModel as its unet, .* with UNet2DConditionModel; give one of those",
        ),
        (lambda folder: edit(folder / "model_index.json", vae=None), "has nothing as its vae"),
        (lambda folder: edit(folder / "unet" / "config.json", in_channels=9), "inpainting and depth models are not"),
        (
            lambda folder: [file.unlink() for file in (folder / "vae").glob("*.safetensors")],
            r"vae holds no \*.safetensors weights; give a folder with weights, or set model.random_weights: true",
        ),
        (
            lambda folder: shutil.rmtree(folder / "tokenizer"),
            r"has no tokenizer \(.*\); set model.tokenizer to the folder",
        ),
        (lambda folder: edit(folder / "scheduler" / "scheduler_config.json", prediction_type="sample"), "predicts sam"),
        (shutil.rmtree, "model.name: .*: no such folder"),
    ],
    ids=["no index", "no json", "another unet", "no vae", "inpainting", "no weights", "no tokenizer", "sample", "none"],
)
def test_a_folder_that_is_no_such_pipeline_is_one_line_with_a_way_out(tiny_painter, paintings, tmp_path, change, words):
    model = broken(tiny_painter, tmp_path / "model", change)
    with pytest.raises(ModelError, match=words) as caught:
        TextToImage().inspect(TrialSpec.from_plain(tiny_diffusion.plain_spec(model, paintings)))
    assert str(caught.value).startswith("model.")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ({"name": "lora", "targets": ["to_q", "to_z"]}, {}, r"^method.targets: to_z is no layer .* to_out.0$"),
        ({"name": "lora", "targets": ["q"]}, {}, "^method.targets: q is no layer"),
    ],
)
def test_targets_that_are_no_layers_are_refused(tiny_painter, paintings, method, changes, words):
    with pytest.raises(ModelError, match=words):
        TextToImage().inspect(TrialSpec.from_plain(tiny_diffusion.plain_spec(tiny_painter, paintings, method)))


def test_a_resolution_that_the_vae_cannot_step_is_refused(tiny_painter, paintings, tmp_path):
    wide = [8, 16, 16, 16, 16]
    model = broken(
        tiny_painter, tmp_path / "m", lambda folder: edit(folder / "vae" / "config.json", block_out_channels=wide)
    )
    plain = tiny_diffusion.plain_spec(model, paintings, data__resolution=72)
    with pytest.raises(ModelError, match="^data.resolution: 72 is no multiple of 16, .* use 64$"):
        TextToImage().inspect(TrialSpec.from_plain(plain))


def test_random_weights_need_no_weights(tiny_painter, paintings, tmp_path):
    def empty(folder):
        for file in folder.rglob("*.safetensors"):
            file.unlink()

    model = broken(tiny_painter, tmp_path / "m", empty)
    plain = tiny_diffusion.plain_spec(model, paintings, model__random_weights=True)
    bench = TextToImage().load(TrialSpec.from_plain(plain), "cpu")
    assert 0 < bench.eval_loss() < 10
    assert TextToImage().load(bench.spec, "cpu").eval_loss() == bench.eval_loss()


def test_an_adapter_that_is_not_trained_paints_as_the_base_does(tiny_painter, paintings):
    plain = tiny_diffusion.plain_spec(tiny_painter, paintings, LORA)
    bench = TextToImage().load(TrialSpec.from_plain(plain), "cpu")
    base = bench.eval_loss()
    ((stage, _),) = bench.spec.method.stages(1)
    bench.attach(stage)
    assert bench.parameters()[0] > 0
    assert bench.eval_loss() == pytest.approx(base, rel=1e-6)
    (image,) = bench.illustrate(bench.evaluate()).images
    assert np.array_equal(numbers(image.before), numbers(image.after))


@pytest.mark.parametrize("method", [LORA, FULL], ids=["lora", "full"])
def test_a_trained_model_paints_otherwise_than_its_base_which_is_painted_once(train, tmp_path, monkeypatch, method):
    monkeypatch.setenv("RAY_PEFT_CACHE", str(tmp_path / "cache"))
    bench = train(tmp_path / "run", method, train__steps=3, evaluation__seeds=[0, 1]).bench
    calls = []
    make = images.make_images

    def counted(*given, **named):
        calls.append(1)
        return make(*given, **named)

    monkeypatch.setattr(images, "make_images", counted)
    first, second = bench.illustrate(bench.evaluate()), bench.illustrate(bench.evaluate())
    assert len(calls) == 3  # after and before, then after alone
    assert [(image.prompt, image.seed) for image in first.images] == [(tiny_diffusion.CAPTIONS[0], n) for n in (0, 1)]
    for image, again in zip(first.images, second.images, strict=True):
        assert image.after.size == (64, 64)
        assert not np.array_equal(numbers(image.after), numbers(image.before))
        assert np.array_equal(numbers(image.before), numbers(again.before))
        assert np.array_equal(numbers(image.after), numbers(again.after))
        assert image.nearest.startswith("painting_")
    scores = first.scores
    assert (scores.eval_rows, scores.generated_rows) == (2, 2)
    assert scores.eval_loss == pytest.approx(sum(first.losses) / 2)
    assert None not in (scores.style_heldout, scores.style_train, scores.nearest_train)


def test_a_trial_whose_evaluation_runs_out_of_memory_scores_the_same_and_says_it(
    tiny_painter, paintings, tmp_path, monkeypatch
):
    plain = tiny_diffusion.plain_spec(
        tiny_painter, paintings, LORA, train__eval_every=2, evaluation__seeds=[0, 1, 2], evaluation__batch_size=4,
        evaluation__guidance_scale=1.0,
    )  # fmt: skip
    spec, load = TrialSpec.from_plain(plain), TextToImage.load

    def trial_of(name):
        monkeypatch.setenv("RAY_PEFT_CACHE", str(tmp_path / f"cache of {name}"))
        row, _ = run(spec, tmp_path / name)
        assert row.status == "finished", row.error
        return row, [numbers(Image.open(file)) for file in sorted((tmp_path / name / "images").glob("p*.png"))]

    def cramped(self, spec, device):
        bench = load(self, spec, device)
        device_memory.enter_context(holds(bench.model.conv_in, 3, training=False))  # PEFT passes by the UNet's hooks
        return bench

    free, painted = trial_of("free")
    monkeypatch.setattr(TextToImage, "load", cramped)
    with contextlib.ExitStack() as device_memory:
        row, painted_again = trial_of("cramped")
    assert free.lowered == {}
    assert row.lowered == {"evaluation.batch_size": 2}
    assert row.scores.eval_loss == pytest.approx(free.scores.eval_loss, rel=1e-6)
    assert row.scores.style_heldout == pytest.approx(free.scores.style_heldout, abs=1e-3)
    assert len(painted) == len(painted_again) == 6
    for one, other in zip(painted, painted_again, strict=True):
        assert abs(one - other).max() <= 1  # rounding of the last bit


def test_the_untouched_base_has_images_after_and_none_before(tiny_painter, paintings):
    plain = tiny_diffusion.plain_spec(tiny_painter, paintings, {"name": "none"})
    bench = TextToImage().load(TrialSpec.from_plain(plain), "cpu")
    (image,) = bench.illustrate(bench.evaluate()).images
    assert image.before is None


def test_no_prompts_make_no_images(tiny_painter, paintings):
    plain = tiny_diffusion.plain_spec(tiny_painter, paintings, {"name": "none"}, evaluation__prompts=[])
    bench = TextToImage().load(TrialSpec.from_plain(plain), "cpu")
    scored = bench.illustrate(bench.evaluate())
    assert scored.images == []
    assert scored.scores.eval_loss > 0
    assert scored.scores.style_heldout is None


def test_images_that_fail_leave_a_row_with_the_loss(tiny_painter, paintings, tmp_path, monkeypatch):
    def fail(*given, **named):
        raise RuntimeError("no room for the VAE")

    monkeypatch.setattr(images, "make_images", fail)
    spec = TrialSpec.from_plain(tiny_diffusion.plain_spec(tiny_painter, paintings, {"name": "none"}))
    row, _ = run(spec, tmp_path)
    assert row.status == "failed"
    assert "no room for the VAE" in row.error
    assert row.scores.eval_loss > 0
    assert len((tmp_path / "losses.jsonl").read_text().splitlines()) == 2


def test_other_weights_or_another_tokenizer_are_another_model(tiny_painter, tmp_path):
    def same(**settings):
        return fingerprint(ModelSpec(name=str(tmp_path / "copy"), **settings))

    shutil.copytree(tiny_painter, tmp_path / "copy")
    first = fingerprint(ModelSpec(name=str(tiny_painter)))
    assert same() == first  # wherever the folder is
    weights = next((tmp_path / "copy" / "vae").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)  # of the same size
    second = same()
    assert second != first
    merges = tmp_path / "copy" / "tokenizer" / "merges.txt"
    merges.write_text(merges.read_text() + "\n")
    assert same() not in (first, second)
    assert same(tokenizer=str(tiny_painter / "tokenizer")) != same()


def test_the_targets_of_every_trial_are_checked(tiny_painter, paintings):
    plains = [
        tiny_diffusion.plain_spec(tiny_painter, paintings, method)
        for method in ({"name": "none"}, LORA, LORA | {"targets": ["to_q", "to_kk"]})
    ]
    trials = [TrialSpec.from_plain(plain) for plain in plains]
    inspect_trials(trials[:2], Console(quiet=True))
    with pytest.raises(ModelError, match="method.targets: to_kk is no layer"):
        inspect_trials(trials, Console(quiet=True))
