"""Scores of a latent diffusion model: losses on held-out images, and the images that it generates for prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ray_peft.engine.recovery import in_parts
from ray_peft.errors import TrialFailed
from ray_peft.spec.keys import EVALUATION_BATCH
from ray_peft.spec.text_to_image import ImageEvaluationSpec

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

Context = Callable[[], AbstractContextManager[object]]
"""Opens what a pass through the model runs in, such as autocast."""


@dataclass(frozen=True)
class PromptImage:
    """The image that the model generates for a prompt and a seed."""

    prompt: str
    seed: int
    image: Image


def even_timesteps(number: int, of: int) -> list[int]:
    """The middles of `number` equal parts of the timesteps 0 to `of` - 1.

    Raises:
        ValueError: there are not so many timesteps.
    """
    if number > of:
        raise ValueError(f"timesteps ({number}) must be at most the {of} that the model was trained with")
    return [(2 * part + 1) * of // (2 * number) for part in range(number)]


def held_out_losses(
    unet: torch.nn.Module,
    moments: Tensor,
    embeddings: Tensor,
    scheduler: Any,
    *,
    timesteps: int,
    prediction: str,
    scaling_factor: float,
    batch_size: int,
    device: str | torch.device,
    dtype: torch.dtype,
    context: Context = nullcontext,
    lowered: dict[str, int] | None = None,
) -> list[float]:
    """The loss of each held-out image: the squared error of the prediction, mean over latent numbers and timesteps.

    The noise depends only on the image's place and the timestep, so it is equal for every trial, device and batch size.
    The error is taken in float32, and all timesteps weigh the same. If a batch does not fit into memory, the batch size
    is halved for the remaining pairs.

    Args:
        unet: called as a UNet2DConditionModel.
        moments: (image, view, 2 * channel, height, width) float32; means before logarithms of variances. Of view 0
            the means are taken, since a drawn latent would be another one for every trial.
        embeddings: (image, token, number) of the captions.
        scheduler: a DDPMScheduler, for its noise levels.
        timesteps: how many, spread evenly.
        prediction: "epsilon" (the noise) or "v_prediction".
        scaling_factor: of the VAE.
        batch_size: pairs of image and timestep that pass the UNet at a time.
        device: where the UNet is.
        dtype: of the UNet's inputs.
        context: opened around each pass.
        lowered: `Bench.lowered`, read and written at `EVALUATION_BATCH`; None remembers nothing.

    Raises:
        torch.OutOfMemoryError: a single pair does not fit.
    """
    import torch

    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction ({prediction}) must be epsilon or v_prediction")
    means = moments[:, 0].float().chunk(2, dim=1)[0] * scaling_factor
    steps = even_timesteps(timesteps, int(scheduler.config.num_train_timesteps))
    pairs = [(index, step) for index in range(len(means)) for step in steps]

    def score(part: Sequence[tuple[int, int]]) -> list[Tensor]:
        places, times = [index for index, _ in part], torch.tensor([step for _, step in part])
        latents = means[places]
        noise = torch.stack([_noise(index, step, latents.shape[1:]) for index, step in part])
        noisy = scheduler.add_noise(latents, noise, times)
        targets = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, times)
        captions = embeddings[places].to(device, dtype)
        with context():
            predictions = unet(noisy.to(device, dtype), times.to(device), encoder_hidden_states=captions).sample
        # Element by element before the mean: float32 keeps what a sum over the whole batch would round.
        return [(predictions.float() - targets.to(device)).square().mean(dim=(1, 2, 3)).cpu()]

    with torch.no_grad(), _evaluating(unet):
        errors = _in_batches(pairs, batch_size, str(device), score, lowered)
    return [float(loss) for loss in torch.cat(errors).double().view(len(means), len(steps)).mean(dim=1)]


def make_images(
    pipeline: Any,
    evaluation: ImageEvaluationSpec,
    resolution: int,
    *,
    context: Context = nullcontext,
    lowered: dict[str, int] | None = None,
    trained: bool = True,
) -> list[PromptImage]:
    """The pipeline's image of every prompt with every seed, prompt by prompt.

    Each image has its own generator on the CPU, so it depends neither on the batch nor on the device's random numbers.
    If a batch does not fit into memory, the batch size is halved for the remaining images.

    Args:
        pipeline: a StableDiffusionPipeline on its device.
        evaluation: prompts, seeds, steps, guidance and batch size.
        resolution: pixels of both sides.
        context: opened around each batch.
        lowered: `Bench.lowered`, read and written at `EVALUATION_BATCH`; None remembers nothing.
        trained: whether the UNet was trained, which decides the advice if numbers are not finite.

    Raises:
        TrialFailed: an image holds numbers that are not finite.
        torch.OutOfMemoryError: a single image does not fit.
    """
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()
    advice = (
        "the trained weights are too large or NaN; where training made them so, lower method.lr"
        if trained
        else "the model's own weights are, or its dtype is too narrow for them; use weights that are whole, or float32"
    )
    pairs = [(prompt, seed) for prompt in evaluation.prompts for seed in evaluation.seeds]

    def make(part: Sequence[tuple[str, int]]) -> list[PromptImage]:
        return _batch(pipeline, part, evaluation, resolution, context, advice)

    with _evaluating(pipeline.unet):
        return _in_batches(pairs, evaluation.batch_size, str(pipeline.device), make, lowered)


def _in_batches(
    items: Sequence[ItemT],
    size: int,
    device: str,
    work: Callable[[Sequence[ItemT]], list[ResultT]],
    lowered: dict[str, int] | None,
) -> list[ResultT]:
    """The results of `work` on at most `size` items at a time, or fewer where memory ran out, which is remembered."""
    lowered = {} if lowered is None else lowered
    first = lowered.get(EVALUATION_BATCH, size)
    results, last = in_parts(items, first, device, work)
    if last < first:
        lowered[EVALUATION_BATCH] = last
    return results


def _batch(
    pipeline: Any,
    pairs: Sequence[tuple[str, int]],
    evaluation: ImageEvaluationSpec,
    resolution: int,
    context: Context,
    advice: str,
) -> list[PromptImage]:
    import torch

    with context():
        images = pipeline(
            prompt=[prompt for prompt, _ in pairs],
            generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in pairs],
            num_inference_steps=evaluation.inference_steps,
            guidance_scale=evaluation.guidance_scale,
            height=resolution,
            width=resolution,
            output_type="pt",
        ).images.float()
    for (prompt, seed), image in zip(pairs, images, strict=True):
        # A picture would hold black in their place.
        if not bool(torch.isfinite(image).all()):
            raise TrialFailed(f"the image of prompt {prompt!r} with seed {seed} is not finite: {advice}")
    processor = pipeline.image_processor
    pictures = processor.numpy_to_pil(processor.pt_to_numpy(images))
    return [PromptImage(prompt, seed, image) for (prompt, seed), image in zip(pairs, pictures, strict=True)]


def _noise(index: int, step: int, shape: torch.Size) -> Tensor:
    """The noise of one held-out image at one timestep; always drawn on the CPU."""
    import torch

    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed((index << 20) + step))


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout; afterwards the model is in its former mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
