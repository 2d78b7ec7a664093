"""A trial of the task `text_to_image`: adapting a latent diffusion model to images with captions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ray_peft.foundation.lists import first_duplicate
from ray_peft.foundation.strict import Strict
from ray_peft.methods.full_weights import FullWeights
from ray_peft.methods.lora import LowRankAdapter
from ray_peft.spec.base import TrainSpec, TrialSpec, check_parts

ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
"""The attention projections of a diffusion UNet."""


class ImageDataSpec(Strict):
    """The images, their captions, and the views of them that the UNet sees."""

    path: str = Field(min_length=1)
    """A folder with images (and below it), or a hub data set id with a column of images."""
    test: int | float = Field(gt=0)
    """Held-out images, never trained on: a count (int), or a fraction of all usable images (float below 1.0)."""
    train: int | float = Field(default=1.0, gt=0)
    """Training images: a count (int), or a fraction of all usable images (float up to 1.0, which means all others)."""
    caption: str | None = None
    """The column with captions; None takes `text` or `caption` of metadata.jsonl, else a .txt file beside an image."""
    split: str = "train"
    """The split of a hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; None is its main branch."""
    seed: int = Field(default=42, ge=0)
    """Draws the split and the views; apart from the trial's seed, so that seeds vary training and not the test."""
    resolution: int = Field(default=512, ge=8)
    """Pixels of both sides, after resizing the shorter side to it and cropping; a multiple of 8 (the VAE's step)."""
    crop: Literal["center", "random"] = "center"
    """Which part of the longer side is trained on. Held-out images are cropped at their centre."""
    flip: bool = False
    """Mirror every second view at random."""
    views: int = Field(default=1, ge=1, le=1000)
    """Crops and flips of each training image that are encoded and cached; each visit of an image draws one of them."""
    min_side: int | None = Field(default=None, ge=1)
    """Shortest side [pixels] of a usable image; None takes `resolution`, since smaller ones would be blown up."""
    unusable: Literal["fail", "skip"] = "fail"
    """What happens to an image that is broken, too small or without caption: nothing starts, or it is left out.
    Either way it is named."""

    @model_validator(mode="after")
    def _check_views(self) -> Self:
        if self.resolution % 8:
            raise ValueError(f"resolution ({self.resolution}) must be a multiple of 8, the step of the VAE")
        check_parts(train=self.train, test=self.test)
        if self.views == 1 and (self.crop == "random" or self.flip):
            raise ValueError(
                "crop: random and flip: true need several views, else every image has the same crop for ever; "
                "set views to 4 or more"
            )
        if self.views > 1 and self.crop == "center" and not self.flip:
            raise ValueError(
                f"views ({self.views}) without crop: random or flip: true would all be equal; use views: 1"
            )
        return self


class ImageTrainSpec(TrainSpec):
    """Training, and the loss of a diffusion model. A row is an image."""

    prediction: Literal["epsilon", "v_prediction"] | None = None
    """What the UNet predicts: the noise, or v (Salimans and Ho 2022, arXiv:2202.00512); None is the model's own."""
    snr_gamma: float | None = Field(default=None, gt=0)
    """Min-SNR weighting of timesteps (Hang et al. 2023, arXiv:2303.09556; 5.0 there); None weighs all alike."""
    noise_offset: float = Field(default=0.0, ge=0)
    """Strength of a constant that is added to the noise of each channel, for very dark and very bright images."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of what is trained, which is then scored and saved; None keeps none."""
    cuda_graphs: bool = True
    """On a GPU, record the passes of the first step once and replay them: the same mathematics without the host's
    time."""


class ImageEvaluationSpec(Strict):
    """How every trial is scored: the same held-out images, timesteps, noise, prompts and seeds."""

    timesteps: int = Field(default=8, ge=1)
    """Timesteps, spread evenly, at which the loss on each held-out image is taken, with fixed noise."""
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Prompts of the images that every trial makes; none makes no images."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(default=(0, 1), min_length=1)
    """Seeds of the initial noise; each prompt is made once with each."""
    inference_steps: int = Field(default=25, ge=1)
    """Denoising steps of an image, with the model's own scheduler."""
    guidance_scale: float = Field(default=7.5, ge=1)
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598); 1 is no guidance."""
    batch_size: int = Field(default=4, ge=1)
    """Images, or held-out images, that pass the UNet at a time."""
    style: Literal["vae_gram"] | None = "vae_gram"
    """How the style of generated images is compared with that of the paintings; None does not compare."""

    @field_validator("prompts", "seeds")
    @classmethod
    def _check_distinct(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"{first_duplicate(values)!r} is there twice; name each once")
        return values


class ImageTrialSpec(TrialSpec):
    """One trial of adapting a text-to-image model."""

    task: Literal["text_to_image"] = "text_to_image"
    data: ImageDataSpec
    train: ImageTrainSpec
    evaluation: ImageEvaluationSpec = ImageEvaluationSpec()

    @model_validator(mode="after")
    def _fill_targets(self) -> Self:
        """An adapter that names no targets gets those of a UNet."""
        method = self.method
        if isinstance(method, LowRankAdapter) and "targets" not in method.model_fields_set:
            object.__setattr__(self, "method", method.model_copy(update={"targets": ATTENTION}))
        return self

    def data_lines(self) -> list[str]:
        """The images and the part of them that is seen."""
        data = self.data
        views = f"; {data.views} views of each" if data.views > 1 else ""
        count = "all others" if data.train == 1.0 and isinstance(data.train, float) else data.train
        return [f"images: {count} for training, {data.test} held out, {data.resolution} px{views}"]

    def loss_line(self) -> str:
        """What the UNet predicts."""
        train = self.train
        parts = [f"squared error of the predicted {train.prediction or 'noise or v, as the model does'}"]
        parts += [f"min-SNR {train.snr_gamma:g}"] if train.snr_gamma else []
        parts += [f"noise offset {train.noise_offset:g}"] if train.noise_offset else []
        return ", ".join(parts)

    def scored_as(self) -> tuple[object, ...]:
        """Timesteps of the held-out loss, and what the UNet is asked to predict."""
        return (self.evaluation.timesteps, self.train.prediction)

    def looked_for(self) -> list[str]:
        """The modules that get an adapter, and its rank; the modules of UNets differ from model to model."""
        method = self.method
        return [*method.targets, f"rank {method.rank}"] if isinstance(method, LowRankAdapter) else []

    def why_not_sharded(self) -> list[str]:
        """Image models are not sharded."""
        return [f"resources.strategy: fsdp does not serve task {self.task}"]

    def problems(self) -> list[str]:
        """Those of every task, and of settings that a UNet does not have."""
        problems = super().problems()
        if self.model.attention is not None:
            problems.append(
                f"model.attention ({self.model.attention}) is for language models; leave it out: a UNet uses torch's "
                "scaled dot product attention"
            )
        if self.model.new_tokens:
            problems.append("model.new_tokens are for language models, whose embeddings are trained; leave them out")
        if self.model.quantization is not None and self.method.name != "qlora":
            problems.append(
                "model.quantization: a UNet in 4 bits is method qlora; use that, or model.quantization: null"
            )
        low = self.method.weights_dtype(self.model.dtype) != "float32"
        if self.train.precision == "fp32" and low:
            key = "method.weights" if isinstance(self.method, FullWeights) else "model.dtype"
            problems.append(f"train.precision: fp32 needs {key}: float32 here; set that, or train.precision: bf16")
        quantization = self.method.quantization()
        if self.train.precision == "fp32" and quantization is not None and quantization.compute_dtype != "float32":
            problems.append(
                f"train.precision: fp32 needs method.compute_dtype: float32 (found {quantization.compute_dtype}); set "
                "that, or train.precision: bf16"
            )
        if self.model.dtype == "float16":
            problems.append("model.dtype: float16 overflows in training; use bfloat16, or float32")
        narrow = self._narrow()
        if self.train.ema_decay is not None and narrow is not None:
            problems.append(
                f"train.ema_decay ({self.train.ema_decay}) needs {narrow}: float32, since an average in bfloat16 "
                "stands still; set that, or leave ema_decay out"
            )
        return problems

    def _narrow(self) -> str | None:
        """The setting that holds what is trained in bfloat16; None if it is held in float32."""
        method = self.method
        if isinstance(method, FullWeights) and method.dtype != "float32":
            return "method.weights"
        if isinstance(method, LowRankAdapter) and method.adapter_dtype != "float32":
            return "method.adapter_dtype"
        return None

    def _local_paths(self, plain: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
        return [(plain["data"], "path")]
