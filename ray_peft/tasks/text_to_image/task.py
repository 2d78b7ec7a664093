"""The task `text_to_image`: adapting a latent diffusion model to images with captions."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ray_peft.engine.trained import Report, Trained
from ray_peft.errors import ModelError
from ray_peft.methods.base import Dtype, Stage, Task
from ray_peft.methods.lora import LowRankAdapter
from ray_peft.metrics.scores import Scores
from ray_peft.spec import ImageTrialSpec, ModelSpec
from ray_peft.spec.identity import Content
from ray_peft.tasks.base import Bench, DataReport, Inspection, Scored, TaskType
from ray_peft.tasks.one_model import ADAPTER_CONFIG, OneModelBench
from ray_peft.tasks.parameters import weight_storage
from ray_peft.vram.cards import Gpu, here

if TYPE_CHECKING:
    from torch import nn

    from ray_peft.tasks.text_to_image.data import Pictures
    from ray_peft.tasks.text_to_image.latents import EncodedData, Encoders
    from ray_peft.vram import Prediction


class TextToImage(TaskType[ImageTrialSpec]):
    """Captioned images in, a model that paints like them out."""

    name: ClassVar[Task] = "text_to_image"
    model_file: ClassVar[str] = "model_index.json"

    def inspect(self, spec: ImageTrialSpec) -> Inspection:
        """Read the pipeline's configurations and tokenizer, and check every image."""
        from ray_peft.tasks.text_to_image import data, fits, latents, model
        from ray_peft.tasks.text_to_image.schedule import check_evaluation

        configs = model.load_configs(spec.model)
        scored = check_evaluation(spec, configs, model.load_noise(spec))
        _check_resolution(spec, configs.parts)
        reach = _check_targets(spec, configs.parts["unet"])
        tokenizer = model.load_tokenizer(spec.model)
        fits.check_parts(spec, configs, tokenizer)
        pictures = data.prepare(spec.data)
        sentences = data.notes(pictures, spec.data)
        longest = int(tokenizer.model_max_length)
        for split, chosen in (("training", pictures.train), ("held-out", pictures.test)):
            if cut := latents.long_captions(chosen, tokenizer):
                many = f"{split} captions are" if len(cut) > 1 else f"{split} caption is"
                sentences.append(f"{len(cut)} {many} cut to {longest} tokens, such as that of {cut[0].name}")
        captions = [picture.caption for picture in (*pictures.train, *pictures.test)]
        sentences += fits.special_token_notes("captions", captions, tokenizer)
        sentences += fits.special_token_notes("prompts", spec.evaluation.prompts, tokenizer)
        sentences += [*fits.prompt_notes(spec.evaluation.prompts, tokenizer), *scored]
        return Inspection(sentences, pictures.key, len(pictures.train), reach)

    def model_content(self, model: ModelSpec) -> str | None:
        """Digest of the folders of its parts; None if it is not here."""
        from ray_peft.tasks.text_to_image import deciding

        return deciding.model_content(model)

    def content(self, spec: ImageTrialSpec) -> str | None:
        """Digest of the pipeline and of every file in and below the folder of images; None for a hub data set."""
        from ray_peft.tasks.text_to_image import deciding

        return deciding.content(spec)

    def fingerprint(self, model: ModelSpec) -> str:
        """Content of a local pipeline, commit of a hub one."""
        from ray_peft.tasks.text_to_image.model import fingerprint

        return fingerprint(model)

    def released(self, spec: ImageTrialSpec, row: ImageTrialSpec) -> Content:
        """The fingerprint, which is the same, and the data key of release 0.1.0."""
        from ray_peft.tasks.text_to_image import data

        return Content(self.fingerprint(spec.model), data.released_key(spec.data))

    def data_report(self, spec: ImageTrialSpec) -> DataReport:
        """Decode every image and count them."""
        from ray_peft.tasks.text_to_image import describe

        return describe.data_report(spec)

    def write_data(self, spec: ImageTrialSpec, folder: Path) -> list[Path]:
        """Write the lists of images, and a sheet of what the UNet sees of them."""
        from ray_peft.tasks.text_to_image import describe

        return describe.write_data(spec, folder)

    def predictor(self, spec: ImageTrialSpec) -> Callable[[ImageTrialSpec, Gpu], Prediction]:
        """The peak of the UNet's training, and of scoring and generating images."""
        return _predictor(spec)

    def total_steps(self, spec: ImageTrialSpec, train_rows: int) -> int:
        """Optimizer steps of a whole trial; a batch may span two epochs."""
        if spec.train.steps is not None:
            return spec.train.steps
        assert spec.train.epochs is not None
        return max(1, math.ceil(spec.train.epochs * train_rows / spec.train.batch_size))

    def load(self, spec: ImageTrialSpec, device: str) -> Bench:
        """Latents and UNet for one trial; random state is that of `spec.seed`."""
        from transformers import set_seed

        from ray_peft.tasks.text_to_image import model

        pictures, encoded = _encoded(spec, device)
        set_seed(spec.seed)
        return ImageBench(spec, device, pictures, encoded, model.load_unet(spec, device))

    def load_trained(self, spec: ImageTrialSpec, weights: Path, device: str) -> Bench:
        """The UNet with a trained adapter, or with trained weights."""
        from ray_peft.tasks.text_to_image import model

        pictures, encoded = _encoded(spec, device)
        if not (weights / ADAPTER_CONFIG).is_file():
            return ImageBench(spec, device, pictures, encoded, model.load_trained_unet(spec, weights, device))
        bench = ImageBench(spec, device, pictures, encoded, model.load_unet(spec, device))
        (stage, _), *_ = spec.method.stages(1)
        bench.attach(stage)
        bench.restore(weights)
        return bench


def _predictor(spec: ImageTrialSpec) -> Callable[[ImageTrialSpec, Gpu], Prediction]:
    from ray_peft.tasks.text_to_image.memory import predict
    from ray_peft.tasks.text_to_image.model import load_configs
    from ray_peft.vram import ModelShape

    shapes = {part: ModelShape.from_config(config) for part, config in load_configs(spec.model).parts.items()}
    others = {part: shapes[part] for part in ("vae", "text_encoder")}

    def of(variant: ImageTrialSpec, gpu: Gpu) -> Prediction:
        return predict(variant, shapes["unet"], gpu=gpu, others=others)

    return of


def _check_resolution(spec: ImageTrialSpec, parts: dict[str, dict[str, Any]]) -> None:
    factor = 2 ** (len(parts["vae"].get("block_out_channels", [64])) - 1)
    if spec.data.resolution % factor:
        raise ModelError(
            f"data.resolution: {spec.data.resolution} is no multiple of {factor}, the step of the VAE of "
            f"{spec.model.name}; use {max(1, round(spec.data.resolution / factor)) * factor}"
        )


def _check_targets(spec: ImageTrialSpec, config: dict[str, Any]) -> list[str]:
    """Check that an adapter's targets are layers of the UNet, before weights are loaded.

    Raises:
        ModelError: one of them is not.
    """
    if not isinstance(spec.method, LowRankAdapter):
        return []
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    try:
        return spec.method.check(unet, of=f"the UNet of {spec.model.name}", key="method")
    except ModelError as error:
        raise ModelError(f"{error}; the attention projections are to_q, to_k, to_v and to_out.0") from None


def _encoded(spec: ImageTrialSpec, device: str) -> tuple[Pictures, EncodedData]:
    """A trial's images as latents and embeddings; VAE and text encoder are loaded on a cache miss alone."""
    from ray_peft.tasks.text_to_image import data, latents, model

    def load() -> Encoders:
        return latents.Encoders(
            vae=model.load_vae(spec.model, device, "float32"),
            text_encoder=model.load_text_encoder(spec.model, device, "float32"),
            tokenizer=model.load_tokenizer(spec.model),
        )

    pictures = data.prepare(spec.data)
    return pictures, latents.encode(spec, pictures, device, load, fingerprint=model.fingerprint(spec.model))


class ImageBench(OneModelBench[ImageTrialSpec]):
    """A UNet with the latents it is trained and scored on."""

    def __init__(
        self, spec: ImageTrialSpec, device: str, pictures: Pictures, encoded: EncodedData, unet: nn.Module
    ) -> None:
        from ray_peft.tasks.text_to_image.model import fingerprint, load_noise

        self.spec = spec
        self.device = device
        self.pictures = pictures
        self.encoded = encoded
        self.model = unet
        self.lowered = {}
        self.weight_storage = weight_storage(unet)
        self.schedule = load_noise(spec)
        self.data_key = pictures.key
        self.model_fingerprint = fingerprint(spec.model)

    def total_steps(self) -> int:
        """Optimizer steps of the whole trial."""
        return TextToImage().total_steps(self.spec, len(self.pictures.train))

    def predicted(self) -> Prediction:
        """The peak of the UNet's training, on the GPU that is here."""
        return _predictor(self.spec)(self.spec, here(self.device))

    def attach(self, stage: Stage) -> None:
        """Prepare the UNet for a stage, from the trial's seed."""
        from transformers import set_seed

        from ray_peft.tasks.text_to_image.passes import attached

        set_seed(self.spec.seed)
        self.model = attached(self.spec, stage, self.model)

    def train(self, stage: Stage, steps: int, first_step: int, folder: Path, report: Report) -> Trained:
        """Train the attached stage on the cached latents."""
        from ray_peft.engine.member import Job
        from ray_peft.tasks.text_to_image.noise import Draws
        from ray_peft.tasks.text_to_image.train import train_stage

        draws = Draws(self.spec, self.encoded.train, self.encoded.scaling_factor, self.schedule)
        job = Job(
            self.spec, stage, steps, first_step, folder, self.device, report, self.eval_loss,
            lowered=self.lowered, costs=self.costs, logs_last=True,
        )  # fmt: skip
        return train_stage(self.spec, job, draws, self.model)

    def eval_loss(self) -> float:
        """Mean squared error of the prediction on the held-out images."""
        losses = self._losses()
        return sum(losses) / len(losses)

    def save(self, folder: Path, dtype: Dtype | None = None) -> None:
        """Write the adapter for diffusers and for PEFT, or the UNet's weights."""
        from ray_peft.tasks.text_to_image import save

        save.save(self.model, folder, dtype or self.spec.train.save_dtype)

    def stored_bytes(self, folder: Path) -> int:
        """Bytes of the weights, the adapter counted once."""
        from ray_peft.tasks.text_to_image import save

        return save.adapter_bytes(folder)

    def export(self, folder: Path, dtype: Dtype) -> None:
        """Write the whole pipeline around the UNet, as diffusers reads it."""
        from ray_peft.tasks.text_to_image import model, save

        pipeline = model.load_pipeline(self.spec, save.converted(self.model, dtype), "cpu", dtype)
        pipeline.save_pretrained(str(folder), safe_serialization=True)

    def evaluate(self) -> Scored:
        """The loss on the held-out images."""
        losses = self._losses()
        return Scored(Scores(eval_loss=sum(losses) / len(losses), eval_rows=len(losses)), losses=losses)

    def illustrate(self, scored: Scored) -> Scored:
        """`scored` with images of the prompts, before and after training, and their likeness to the data."""
        from ray_peft.tasks.text_to_image.images import generate

        if not self.spec.evaluation.prompts:
            return scored
        fingerprint, lowered = self.model_fingerprint, self.lowered
        return generate(self.spec, self.device, self.model, self.pictures, fingerprint, scored, lowered)

    def _losses(self) -> list[float]:
        """Of each held-out image."""
        from ray_peft.tasks.text_to_image.evaluate import held_out_losses
        from ray_peft.tasks.text_to_image.passes import computing, input_dtype

        test, evaluation = self.encoded.test, self.spec.evaluation
        return held_out_losses(
            self.model,
            test.moments,
            test.embeddings,
            self.schedule,
            timesteps=evaluation.timesteps,
            prediction=self.schedule.config.prediction_type,
            scaling_factor=self.encoded.scaling_factor,
            batch_size=evaluation.batch_size,
            device=self.device,
            dtype=input_dtype(self.spec),
            context=lambda: computing(self.spec, self.device),
            lowered=self.lowered,
        )
