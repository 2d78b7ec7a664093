"""The images that a trial generates, with the trained model and with its base, and their likeness to the data."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ray_peft.engine.recovery import free_memory
from ray_peft.foundation.cache import entry, made_whole
from ray_peft.spec import ImageTrialSpec
from ray_peft.tasks.base import GeneratedImage, Scored
from ray_peft.tasks.text_to_image.evaluate import make_images
from ray_peft.tasks.text_to_image.passes import computing, unwrapped
from ray_peft.tasks.text_to_image.style import Likeness, compare, study, with_style

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from ray_peft.tasks.text_to_image.data import Picture, Pictures


def generate(
    spec: ImageTrialSpec,
    device: str,
    model: nn.Module,
    pictures: Pictures,
    fingerprint: str,
    scored: Scored,
    lowered: dict[str, int] | None = None,
) -> Scored:
    """`scored` with images of the prompts and their likeness to the paintings.

    The memory of the training is freed before VAE and text encoder are loaded to `device`. `lowered` is as for
    `make_images`.
    """
    from ray_peft.tasks.text_to_image.model import load_pipeline

    free_memory(device)
    pipeline = load_pipeline(spec, unwrapped(model), device)

    def make(trained: bool) -> list[Image]:
        size, context = spec.data.resolution, partial(computing, spec, device)
        images = make_images(pipeline, spec.evaluation, size, context=context, lowered=lowered, trained=trained)
        return [image.image for image in images]

    trained = spec.method.name != "none"
    after = make(trained)
    before = _before(spec, device, model, pipeline, fingerprint, partial(make, False)) if trained else None
    likeness = _likeness(spec, pipeline.vae, after, pictures)
    pairs = [(prompt, seed) for prompt in spec.evaluation.prompts for seed in spec.evaluation.seeds]
    images = [
        GeneratedImage(
            prompt=prompt,
            seed=seed,
            after=after[place],
            before=before[place] if before is not None else None,
            nearest=likeness[place].nearest if likeness else None,
            nearest_likeness=likeness[place].nearest_likeness if likeness else None,
        )
        for place, (prompt, seed) in enumerate(pairs)
    ]
    scores = scored.scores.model_copy(update={"generated_rows": len(images)})
    return replace(scored, scores=with_style(scores, likeness), images=images)


def _likeness(spec: ImageTrialSpec, vae: Any, images: list[Image], pictures: Pictures) -> list[Likeness]:
    if spec.evaluation.style is None:
        return []
    from ray_peft.tasks.text_to_image.data import view_of

    def square(picture: Picture) -> tuple[str, Image]:
        return picture.name, view_of(picture.open(), picture, spec.data, None)

    train, held_out = (study(vae, map(square, split)) for split in (pictures.train, pictures.test))
    return compare(vae, images, train, held_out)


def _before(
    spec: ImageTrialSpec, device: str, model: Any, pipeline: Any, fingerprint: str, make: Callable[[], list[Image]]
) -> list[Image]:
    """The base's images of the same prompts and seeds, generated once for all trials on one base, and cached."""
    from PIL import Image

    evaluation = spec.evaluation.model_copy(update={"timesteps": 1, "batch_size": 1, "style": None})  # change no image
    stored = spec.quantization.plain() if spec.quantization is not None else pipeline.unet.dtype
    train, kind = [spec.train.prediction, spec.train.precision], device.partition(":")[0]
    settings = [evaluation.plain(), str(stored), spec.data.resolution, train, kind]
    key = hashlib.sha256(json.dumps([fingerprint, spec.model.dtype, settings]).encode()).hexdigest()[:24]
    folder = entry("images", key)
    count = len(evaluation.prompts) * len(evaluation.seeds)
    if not folder.is_dir():
        with _as_base(spec, device, model, pipeline):
            images = make()
        with made_whole(folder, f"{count - 1}.png") as partial:
            for place, image in enumerate(images):
                image.save(partial / f"{place}.png")
    return [Image.open(folder / f"{place}.png").convert("RGB") for place in range(count)]


@contextlib.contextmanager
def _as_base(spec: ImageTrialSpec, device: str, model: Any, pipeline: Any) -> Iterator[None]:
    """The pipeline with the untouched base: adapters are switched off, or the base's weights are loaded again."""
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
        return
    from ray_peft.tasks.text_to_image.model import load_unet

    trained = pipeline.unet
    trained.to("cpu")  # a card that holds one UNet need not hold two
    free_memory(device)
    try:
        pipeline.unet = load_unet(spec, device)
        yield
    finally:
        pipeline.unet = None
        free_memory(device)
        pipeline.unet = trained.to(device)
