"""Pictures -> the VAE's posteriors and captions -> the text encoder's states, once per content and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_peft.engine.recovery import free_memory
from ray_peft.errors import ModelError
from ray_peft.foundation.cache import entry, made_whole
from ray_peft.spec.text_to_image import ImageDataSpec, ImageTrialSpec
from ray_peft.tasks.text_to_image.data import Picture, Pictures, as_tensor, view_of

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised when the encoding changes its result, so that older files are not used again."""

_SETTINGS = "encoded.json"


@dataclass
class Encoders:
    """The models that turn pictures and captions into the UNet's inputs, each in the dtype that it was loaded in.

    The VAE should be in float32. It runs once per picture, so its time does not matter; bfloat16 keeps only 8 bits of
    each activation, and every trial would train on latents that lack detail.
    """

    vae: Any
    """An AutoencoderKL."""
    text_encoder: Any
    """A CLIPTextModel."""
    tokenizer: Any
    """Its CLIPTokenizer."""


@dataclass(frozen=True)
class Encoded:
    """The encoded images of one split, in its order."""

    moments: Tensor
    """(image, view, 2 * channels, height, width) float32: mean and log-variance of the VAE's posterior, not scaled."""
    embeddings: Tensor
    """(image, token, width) float32: the text encoder's last hidden state for the padded caption."""
    truncated: int
    """Captions longer than the tokenizer's length, of which the end is lost."""


@dataclass(frozen=True)
class EncodedData:
    """Both splits, encoded."""

    train: Encoded
    test: Encoded
    """With one view of each image."""
    key: str
    """Content hash of images, captions, views and encoders."""
    scaling_factor: float
    """What a latent is multiplied by before the UNet sees it."""


def encode(
    spec: ImageTrialSpec, pictures: Pictures, device: str, load: Callable[[], Encoders], *, fingerprint: str
) -> EncodedData:
    """The encoded pictures from the cache; if they are not there, they are encoded now and put there.

    `load` is only called if the cache lacks them; `fingerprint` differs for encoders of other weights or dtype.
    Afterwards neither encoder is on the device.

    Raises:
        ModelError: an encoder gives NaN or infinity for a picture or caption.
    """
    key = hashlib.sha256(json.dumps([FORMAT, pictures.key, fingerprint]).encode()).hexdigest()[:24]
    folder = entry("latents", key)
    cached = _read(folder, key, pictures)
    if cached is not None:
        return cached
    if folder.exists():
        logger.warning("%s: the encoded images are damaged and are made anew", folder)
        # Moved away first: a folder half removed could not be replaced in one step.
        broken = folder.with_name(f"{key}.{uuid.uuid4().hex[:8]}.broken")
        with contextlib.suppress(OSError):  # another process moves it, too
            folder.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)
    started = time.perf_counter()
    built = _build(spec.data, pictures, device, load, folder)
    count = len(pictures.train) + len(pictures.test)
    logger.info("encoded %d images in %.1f s: %s", count, time.perf_counter() - started, folder)
    # Rather what is in the cache: if another process was first, both continue with the same numbers.
    return _read(folder, key, pictures) or built


def embed(captions: Sequence[str], encoders: Encoders, device: str) -> Tensor:
    """(caption, token, width) float32: the text encoder's last hidden state, as StableDiffusionPipeline computes it.

    Captions are padded and cut to the tokenizer's length. The text encoder must be on `device`.
    """
    import torch

    tokenizer, text_encoder = encoders.tokenizer, encoders.text_encoder
    states = []
    with torch.inference_mode():
        for caption in captions:
            tokens = tokenizer(
                caption,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            uses_mask = getattr(text_encoder.config, "use_attention_mask", False)
            mask = tokens.attention_mask.to(device) if uses_mask else None
            states.append(text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0].float().cpu())
    # Copied outside of the inference mode, whose own tensors may not be trained on.
    return torch.cat(states)


def _read(folder: Path, key: str, pictures: Pictures) -> EncodedData | None:
    """The content of the cache; None if it is not there or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        splits = {}
        for split, chosen in (("train", pictures.train), ("test", pictures.test)):
            # Read and not mapped: a map of a file that is damaged later kills the process with a bus error.
            tensors = load((folder / f"{split}.safetensors").read_bytes())
            splits[split] = Encoded(tensors["moments"], tensors["embeddings"], int(settings["truncated"][split]))
            if len(splits[split].moments) != len(chosen) or len(splits[split].embeddings) != len(chosen):
                return None
        return EncodedData(splits["train"], splits["test"], key, float(settings["vae"]["scaling_factor"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _build(
    data: ImageDataSpec, pictures: Pictures, device: str, load: Callable[[], Encoders], folder: Path
) -> EncodedData:
    """Encode the pictures and write them into `folder`."""
    from safetensors.torch import save_file

    splits = {"train": pictures.train, "test": pictures.test}
    views: dict[str, list[int | None]] = {"train": list(range(data.views)), "test": [None]}
    encoders = load()
    factor = float(encoders.vae.config.scaling_factor)
    with _on(encoders.vae, device) as model:
        moments = {split: _moments(chosen, views[split], data, model, device) for split, chosen in splits.items()}
    with _on(encoders.text_encoder, device):
        embeddings = {split: _embeddings(chosen, encoders, device) for split, chosen in splits.items()}
    truncated = {split: len(long_captions(chosen, encoders.tokenizer)) for split, chosen in splits.items()}
    with made_whole(folder, _SETTINGS) as partial:
        for split in splits:
            tensors = {"moments": moments[split], "embeddings": embeddings[split]}
            save_file(tensors, partial / f"{split}.safetensors")
        (partial / _SETTINGS).write_text(
            json.dumps({"truncated": truncated, "vae": {"scaling_factor": factor}}), encoding="utf-8"
        )
    encoded = {split: Encoded(moments[split], embeddings[split], truncated[split]) for split in splits}
    return EncodedData(encoded["train"], encoded["test"], folder.name, factor)


@contextmanager
def _on(model: Any, device: str) -> Iterator[Any]:
    """The model on `device`, without dropout; on the CPU afterwards, with its memory on the device free."""
    try:
        yield model.to(device).eval()
    finally:
        model.to("cpu")
        free_memory(device)


def _moments(
    chosen: Sequence[Picture], views: Sequence[int | None], data: ImageDataSpec, vae: Any, device: str
) -> Tensor:
    """(image, view, 2 * channels, height, width) float32 on the CPU."""
    import torch

    encoded = []
    for picture, squares in zip(chosen, _squares(chosen, views, data), strict=True):
        with torch.inference_mode():
            posteriors = [vae.encode(square[None].to(device, vae.dtype)).latent_dist for square in squares]
            parts = [torch.cat([posterior.mean, posterior.logvar], dim=1)[0] for posterior in posteriors]
            moments = torch.stack([part.float().cpu() for part in parts])
        if not torch.isfinite(moments).all():
            raise ModelError(
                f"{picture.name}: the VAE makes NaN or infinity of this image in {_dtype(vae)}; load the VAE in "
                "float32, or use one whose weights are whole"
            )
        encoded.append(moments)
    # Copied outside of the inference mode, whose own tensors may not be trained on.
    return torch.stack(encoded)


def _squares(chosen: Sequence[Picture], views: Sequence[int | None], data: ImageDataSpec) -> Iterator[list[Tensor]]:
    """All views of each picture, decoded a few pictures ahead of the encoder by other threads."""

    def squares(picture: Picture) -> list[Tensor]:
        image = picture.open()
        return [as_tensor(view_of(image, picture, data, view)) for view in views]

    threads = min(os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[list[Tensor]]] = deque()
        for picture in chosen:
            ahead.append(pool.submit(squares, picture))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _embeddings(chosen: Sequence[Picture], encoders: Encoders, device: str) -> Tensor:
    import torch

    embeddings = embed([picture.caption for picture in chosen], encoders, device)
    for picture, embedding in zip(chosen, embeddings, strict=True):
        if not torch.isfinite(embedding).all():
            raise ModelError(
                f"{picture.name}: the text encoder makes NaN or infinity of its caption in "
                f"{_dtype(encoders.text_encoder)}; load it in float32, or use one whose weights are whole"
            )
    return embeddings


def long_captions(chosen: Sequence[Picture], tokenizer: Any) -> list[Picture]:
    """The pictures whose captions are longer than the tokenizer's length."""
    longest = tokenizer.model_max_length
    # verbose=False: the tokenizer would warn of each, and they are named here.
    return [picture for picture in chosen if len(tokenizer(picture.caption, verbose=False).input_ids) > longest]


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")
