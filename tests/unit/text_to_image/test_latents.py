"""Encoded images: equal to the pipeline's own, made once, and whole or absent."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_diffusion
import torch

from ray_peft.errors import ModelError
from ray_peft.spec.text_to_image import ImageTrialSpec
from ray_peft.tasks.text_to_image.data import pixels, prepare
from ray_peft.tasks.text_to_image.latents import EncodedData, Encoders, encode


@pytest.fixture(scope="session")
def images(shared: Path) -> Path:
    return tiny_diffusion.write_images(shared / "images-of-latents", 6)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAY_PEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def trial(model: Path, images: Path, **changes: Any) -> ImageTrialSpec:
    return ImageTrialSpec.from_plain(tiny_diffusion.plain_spec(model, images, **changes))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Encoders:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    return Encoders(
        AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype),
        CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype),
        CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
    )


def refuse() -> Encoders:
    raise AssertionError("the encoders are loaded although their results are kept")


def run(spec: ImageTrialSpec, loader: Callable[[], Encoders], fingerprint: str = "tiny float32") -> EncodedData:
    return encode(spec, prepare(spec.data), "cpu", loader, fingerprint=fingerprint)


def equal(one: EncodedData, other: EncodedData) -> bool:
    pairs = ((one.train, other.train), (one.test, other.test))
    return all(
        torch.equal(a.moments, b.moments) and torch.equal(a.embeddings, b.embeddings) and a.truncated == b.truncated
        for a, b in pairs
    )


def test_moments_and_embeddings_are_those_of_the_pipeline(tiny_painter: Path, images: Path) -> None:
    from diffusers import StableDiffusionPipeline

    spec = trial(tiny_painter, images, data__crop="random", data__flip=True, data__views=4)
    pictures = prepare(spec.data)
    encoded_data = run(spec, lambda: load(tiny_painter))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_painter, safety_checker=None)
    assert encoded_data.train.moments.shape == (4, 4, 8, 8, 8)
    assert encoded_data.test.moments.shape == (2, 1, 8, 8, 8)
    assert encoded_data.train.embeddings.shape == (4, 77, 32)
    assert encoded_data.scaling_factor == 0.18215
    splits: list[tuple[Any, Any, list[int | None]]] = [
        (pictures.train, encoded_data.train, [0, 1, 2, 3]),
        (pictures.test, encoded_data.test, [None]),
    ]
    for chosen, encoded, views in splits:
        assert encoded.moments.dtype == encoded.embeddings.dtype == torch.float32
        for index, picture in enumerate(chosen):
            for place, view in enumerate(views):
                with torch.no_grad():
                    posterior = pipeline.vae.encode(pixels(picture, spec.data, view)[None]).latent_dist
                mean, logvar = encoded.moments[index, place].chunk(2)
                assert torch.allclose(mean, posterior.mean[0], atol=1e-5)
                assert torch.allclose(logvar, posterior.logvar[0], atol=1e-5)
            with torch.no_grad():
                embedding, _ = pipeline.encode_prompt(picture.caption, "cpu", 1, do_classifier_free_guidance=False)
            assert torch.allclose(encoded.embeddings[index], embedding[0], atol=1e-6)
    assert not torch.allclose(encoded_data.train.moments[0, 0], encoded_data.train.moments[1, 0], atol=1e-2)
    assert not torch.allclose(encoded_data.train.embeddings[0], encoded_data.train.embeddings[1], atol=1e-3)


def test_what_is_made_and_what_is_kept_can_be_trained_on(tiny_painter: Path, images: Path) -> None:
    spec = trial(tiny_painter, images)
    for _ in range(2):
        encoded_data = run(spec, lambda: load(tiny_painter))
        weight = torch.ones(8, 1, 1, requires_grad=True)
        (encoded_data.train.moments * weight).sum().backward()
        assert weight.grad is not None


def test_a_second_trial_loads_no_encoders_and_leaves_none_behind(tiny_painter: Path, images: Path, cache: Path) -> None:
    spec = trial(tiny_painter, images)
    alive: list[weakref.ref[Any]] = []

    def watched() -> Encoders:
        encoders = load(tiny_painter)
        alive.extend([weakref.ref(encoders.vae), weakref.ref(encoders.text_encoder)])
        return encoders

    first = run(spec, watched)
    gc.collect()
    assert len(alive) == 2
    assert [each() for each in alive] == [None, None]
    other_method = trial(tiny_painter, images, method={"name": "full", "lr": 1e-5, "weights": "float32"}, seed=7)
    second = run(other_method, refuse)
    assert first.key == second.key
    assert equal(first, second)
    assert sorted(path.name for path in (cache / "latents" / first.key).iterdir()) == [
        "encoded.json", "test.safetensors", "train.safetensors"
    ]  # fmt: skip


@pytest.mark.parametrize("what", ["fingerprint", "data", "caption"])
def test_other_encoders_or_data_are_encoded_anew(tiny_painter: Path, tmp_path: Path, what: str) -> None:
    images = tiny_diffusion.write_images(tmp_path / "images", 5)
    spec = trial(tiny_painter, images)
    first = run(spec, lambda: load(tiny_painter))
    if what == "caption":
        lines = (images / "metadata.jsonl").read_text().replace("number 3", "number three")
        (images / "metadata.jsonl").write_text(lines)
    changed = trial(tiny_painter, images, data__resolution=72) if what == "data" else spec
    fingerprint = "tiny bfloat16" if what == "fingerprint" else "tiny float32"
    with pytest.raises(AssertionError, match="encoders are loaded"):
        run(changed, refuse, fingerprint)
    assert run(changed, lambda: load(tiny_painter), fingerprint).key != first.key


def test_encoders_keep_their_own_dtype_and_results_are_float32(tiny_painter: Path, images: Path) -> None:
    spec = trial(tiny_painter, images)
    exact = run(spec, lambda: load(tiny_painter))
    rough = run(spec, lambda: load(tiny_painter, torch.bfloat16), "tiny bfloat16")
    assert rough.train.moments.dtype == rough.train.embeddings.dtype == torch.float32
    assert torch.equal(rough.train.moments, rough.train.moments.bfloat16().float())
    assert not torch.equal(exact.train.moments, rough.train.moments)
    assert torch.allclose(exact.train.moments, rough.train.moments, atol=0.1)


def test_long_captions_are_cut_and_counted(tiny_painter: Path, tmp_path: Path) -> None:
    images = tiny_diffusion.write_images(tmp_path / "images", 5)
    lines = (images / "metadata.jsonl").read_text().replace(", number", " w" * 75 + " w, number", 1)
    (images / "metadata.jsonl").write_text(lines)
    encoded_data = run(trial(tiny_painter, images), lambda: load(tiny_painter))
    assert encoded_data.train.truncated + encoded_data.test.truncated == 1
    assert encoded_data.train.embeddings.shape[1] == 77


def damage_shorten(folder: Path) -> None:
    content = (folder / "train.safetensors").read_bytes()
    (folder / "train.safetensors").write_bytes(content[:-100])


def damage_remove(folder: Path) -> None:
    (folder / "test.safetensors").unlink()


def damage_settings(folder: Path) -> None:
    (folder / "encoded.json").write_text('{"truncated": ')


def damage_swap(folder: Path) -> None:
    (folder / "train.safetensors").write_bytes((folder / "test.safetensors").read_bytes())


@pytest.mark.parametrize("damage", [damage_shorten, damage_remove, damage_settings, damage_swap])
def test_a_damaged_folder_is_made_anew(
    tiny_painter: Path, images: Path, cache: Path, damage: Callable[[Path], None]
) -> None:
    spec = trial(tiny_painter, images)
    first = run(spec, lambda: load(tiny_painter))
    damage(cache / "latents" / first.key)
    with pytest.raises(AssertionError, match="encoders are loaded"):
        run(spec, refuse)
    assert equal(run(spec, lambda: load(tiny_painter)), first)
    assert equal(run(spec, refuse), first)
    assert [path.name for path in (cache / "latents").iterdir()] == [first.key]


def test_two_at_once_end_with_one_folder(tiny_painter: Path, images: Path, cache: Path) -> None:
    spec = trial(tiny_painter, images)
    barrier = threading.Barrier(2)
    loaded = [load(tiny_painter), load(tiny_painter)]

    def together() -> Encoders:
        barrier.wait(timeout=60)  # nobody goes on until both have found the cache empty
        return loaded.pop()

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: run(spec, together), range(2))
    assert equal(one, other)
    assert [path.name for path in (cache / "latents").iterdir()] == [one.key]
    assert equal(run(spec, refuse), one)


def test_not_a_number_names_the_picture(tiny_painter: Path, images: Path, cache: Path) -> None:
    spec = trial(tiny_painter, images)
    first = prepare(spec.data).train[0]

    def broken_vae() -> Encoders:
        encoders = load(tiny_painter)
        encoders.vae.quant_conv.weight.data[0, 0] = float("inf")
        return encoders

    def broken_text_encoder() -> Encoders:
        encoders = load(tiny_painter)
        encoders.text_encoder.get_input_embeddings().weight.data.fill_(float("nan"))
        return encoders

    with pytest.raises(ModelError, match=f"^{first.name}: the VAE makes NaN or infinity of this image in float32; "):
        run(spec, broken_vae)
    with pytest.raises(ModelError, match=f"^{first.name}: the text encoder makes NaN or infinity of its caption"):
        run(spec, broken_text_encoder)
    assert not list(cache.glob("latents/*"))
