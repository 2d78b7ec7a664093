"""The likeness of generated images to paintings: in style by Gram matrices of the VAE's encoder, in content by pixels.

A style vector holds, for each layer, which channels vary together over all places: texture, strokes and contrasts of
colours, but not where anything is (Gatys et al. 2016, arXiv:1508.06576, who use a classifier's layers and do not
subtract each channel's mean). The layers of a VAE were trained to rebuild images, not to name what they show, so its
high layers say less about objects than those of a classifier. The numbers order images by likeness; their absolute size
means nothing.

A content vector is the image itself, averaged over squares of 8 pixels, less the mean colour. It finds copies whatever
the VAE's weights are, blurred and noisy ones included; it does not find mirrored copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_peft.metrics.scores import Scores
from ray_peft.tasks.text_to_image.data import as_tensor

SQUARE = 8
"""Pixels of a side of the squares that content is averaged over."""

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class Paintings:
    """The style and content vectors of some paintings."""

    names: tuple[str, ...]
    style: Tensor
    """(number,) mean of their style vectors, float32 on the CPU: its product with a vector is the mean cosine."""
    content: Tensor
    """(painting, number) their content vectors, float32 on the CPU."""


@dataclass(frozen=True)
class Likeness:
    """The likeness of one generated image to the paintings."""

    style_heldout: float
    style_train: float
    nearest: str
    """The training painting that is most similar to it in content."""
    nearest_likeness: float
    """Cosine of the two content vectors; a copy is 1.0."""


def study(vae: Any, images: Iterable[tuple[str, Image]]) -> Paintings:
    """Compute the vectors of paintings, one at a time.

    Args:
        vae: a frozen AutoencoderKL, in float32 or bfloat16.
        images: (name, image) of each painting; all of the size of the images to make, cropped as for training.

    Raises:
        ValueError: there is none.
    """
    import torch

    names, contents = [], []
    total: Tensor | None = None
    for name, image in images:
        style, content = vectors(vae, image)
        names.append(name)
        contents.append(content)
        total = style if total is None else total + style
    if total is None:
        raise ValueError("there is no painting to compare with")
    return Paintings(tuple(names), total / len(names), torch.stack(contents))


def compare(vae: Any, images: Iterable[Image], train: Paintings, held_out: Paintings) -> list[Likeness]:
    """The likeness of each generated image to the training paintings and to the held-out paintings."""
    likenesses = []
    for image in images:
        style, content = vectors(vae, image)
        if content.shape != train.content.shape[1:]:
            raise ValueError(f"{tuple(image.size)} is another size than that of the training paintings")
        cosines = train.content @ content
        nearest = int(cosines.argmax())
        likenesses.append(
            Likeness(
                style_heldout=float(held_out.style @ style),
                style_train=float(train.style @ style),
                nearest=train.names[nearest],
                nearest_likeness=float(cosines[nearest]),
            )
        )
    return likenesses


def with_style(scores: Scores, likenesses: Sequence[Likeness]) -> Scores:
    """`scores` with the means over the generated images."""
    if not likenesses:
        return scores
    count = len(likenesses)
    return scores.model_copy(
        update={
            "style_heldout": sum(likeness.style_heldout for likeness in likenesses) / count,
            "style_train": sum(likeness.style_train for likeness in likenesses) / count,
            "nearest_train": sum(likeness.nearest_likeness for likeness in likenesses) / count,
            "generated_rows": count,
        }
    )


def vectors(vae: Any, image: Image) -> tuple[Tensor, Tensor]:
    """The style vector and the content vector of an image, both of length one, float32 on the CPU.

    Returns:
        (number,) the upper halves of the centred Gram matrices of conv_in and of each down block, each layer with equal
        weight, so that a product of two is the mean over layers of the cosines of their Gram matrices; and (number,)
        the coarse image, each colour less its mean.
    """
    import torch

    pixels = as_tensor(image.convert("RGB"))[None]
    with torch.no_grad(), _grams(vae.encoder) as grams:
        vae.encoder(pixels.to(vae.device, vae.dtype))
    style = torch.cat(grams) / len(grams) ** 0.5
    coarse = torch.nn.functional.avg_pool2d(pixels[0], SQUARE)
    content = coarse - coarse.mean(dim=(1, 2), keepdim=True)
    return style, torch.nn.functional.normalize(content.flatten(), dim=0)


@contextmanager
def _grams(encoder: Any) -> Iterator[list[Tensor]]:
    """Collects the Gram matrix of each layer while an image passes; the activations themselves are not kept."""
    grams: list[Tensor] = []
    with looking(encoder, lambda activation: grams.append(gram(activation).cpu())):
        yield grams


@contextmanager
def looking(encoder: Any, look: Callable[[Tensor], object]) -> Iterator[None]:
    """Calls `look` with the output of each layer of a VAE's encoder that style is computed from."""

    def hook(layer: object, inputs: object, activation: Tensor) -> None:
        look(activation)

    hooks = [layer.register_forward_hook(hook) for layer in (encoder.conv_in, *encoder.down_blocks)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def gram(activation: Tensor) -> Tensor:
    """(channel * (channel + 1) / 2,) the upper half of the centred Gram matrix, of Frobenius norm one.

    Args:
        activation: (1, channel, height, width).
    """
    import torch

    flat = activation[0].float().flatten(1)
    # Without this the channels' means, which depend on colours alone, hide the texture (numbers in EXPERIMENTS.md).
    flat = flat - flat.mean(dim=1, keepdim=True)
    matrix = flat @ flat.T / flat.shape[1]
    # Each number off the diagonal stands for two, so that the halves' product is that of the whole matrices.
    weight = torch.full_like(matrix, 2**0.5).fill_diagonal_(1.0)
    first, second = torch.triu_indices(*matrix.shape, device=matrix.device)
    return torch.nn.functional.normalize((matrix * weight)[first, second], dim=0)
