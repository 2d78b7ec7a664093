"""Images with captions -> usable pictures, split by content, and the views of them that the UNet sees."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ray_peft.errors import DataError, first_line
from ray_peft.spec.base import is_local
from ray_peft.spec.identity import differing
from ray_peft.spec.text_to_image import ImageDataSpec
from ray_peft.tasks.text_to_image.decoding import FRAMES, TRANSPARENT, BrokenImageError, decoded
from ray_peft.tasks.text_to_image.listing import named
from ray_peft.tasks.text_to_image.repeats import look, repeated
from ray_peft.tasks.text_to_image.sources import ImageSource, find

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

FORMAT = 1
"""Raised when the preparation changes its result, so that older encoded images are not used again."""

_TRAITS = {
    FRAMES: "with several frames or pages, of which the first is used",
    TRANSPARENT: "with transparent parts, which are laid over white",
}


@dataclass(frozen=True)
class Picture:
    """One usable image with its caption."""

    name: str
    """Its path relative to the folder, or `row N` of a hub data set."""
    caption: str
    width: int
    """Pixels, upright."""
    height: int
    content: str
    """Hash of the file's bytes."""
    read: Callable[[], bytes] = field(repr=False, compare=False)
    """Gives the file's bytes."""
    traits: tuple[str, ...] = ()
    """The parts of the file that are not used, as in `Decoded`."""

    def open(self) -> Image:
        """The whole image, upright, in RGB.

        Raises:
            DataError: the file is not the one that was prepared.
        """
        try:
            content = self.read()
            if hashlib.sha256(content).hexdigest() == self.content:
                return decoded(content).image
            reason = "its content is another"
        except (OSError, BrokenImageError) as error:
            reason = first_line(error)
        raise DataError(f"data.path: {self.name} has changed while it was in use ({reason}); start again")


@dataclass(frozen=True)
class Pictures:
    """The images of both splits; the same for every trial with the same `data`, wherever the folder is."""

    key: str
    """Content hash of the data settings, the images and their captions."""
    train: tuple[Picture, ...]
    """In the order of the draw, as `test`."""
    test: tuple[Picture, ...]
    read: int
    """Images found, usable or not."""
    unusable: dict[str, str]
    """Why an image is left out, by its name."""
    repeats: dict[str, str]
    """By the name of an image that is left out of training, the held-out image that it repeats."""
    remarks: tuple[str, ...] = ()
    """Sentences on files beside the images that are not used."""


@dataclass(frozen=True)
class _Decoded:
    """An image that was decoded once."""

    picture: Picture
    look: bytes


def prepare(data: ImageDataSpec) -> Pictures:
    """Find the images, decode each once, and draw the splits.

    Raises:
        DataError: images or metadata are missing, malformed or too few, or unusable where they must not be.
    """
    sources = find(data)
    images = sources.images
    # Decoders release the interpreter's lock; more threads than cores would only hold more whole images in memory.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        results = list(pool.map(lambda image: _decode(image, data), images))
    unusable = {image.name: result for image, result in zip(images, results, strict=True) if isinstance(result, str)}
    usable = [result for result in results if isinstance(result, _Decoded)]
    if unusable and data.unusable == "fail":
        lower = "lower data.min_side, " if any(why.startswith("too small") for why in unusable.values()) else ""
        raise DataError(
            f"data.path: {data.path}: {len(unusable)} of {len(images)} images are unusable: "
            f"{named([f'{name} ({reason})' for name, reason in unusable.items()])}; mend or remove them, "
            f"{lower}or leave them out with data.unusable: skip"
        )
    train, test, repeats = _split(usable, data, len(images))
    key = _key(data, train, test)
    return Pictures(key, tuple(train), tuple(test), len(images), unusable, repeats, tuple(sources.remarks))


def notes(pictures: Pictures, data: ImageDataSpec) -> list[str]:
    """What a reader of the comparison must know: images used, left out, and enlarged."""
    name = Path(data.path).expanduser().absolute().name if is_local(data.path) else data.path
    counted = f"{len(pictures.train)} training and {len(pictures.test)} held-out images of {pictures.read} read"
    sentences = [f"{name}: {counted}"]
    if pictures.unusable:
        picture = named([f"{image} ({reason})" for image, reason in pictures.unusable.items()])
        sentences.append(f"{name}: left out {_images(len(pictures.unusable))} that cannot be used: {picture}")
    if pictures.repeats:
        picture = named([f"{image} (as {held_out})" for image, held_out in pictures.repeats.items()])
        sentences.append(
            f"{name}: left out {_images(len(pictures.repeats), 'training ')} repeating held-out ones: {picture}"
        )
    small = [
        picture.name
        for picture in (*pictures.train, *pictures.test)
        if min(picture.width, picture.height) < data.resolution
    ]
    if small:
        sentences.append(f"{name}: {_images(len(small))} blown up to {data.resolution} px: {named(small)}")
    for trait, words in _TRAITS.items():
        having = [picture.name for picture in (*pictures.train, *pictures.test) if trait in picture.traits]
        sentences += [f"{name}: {_images(len(having))} {words}: {named(having)}"] if having else []
    return sentences + [f"{name}: {remark}" for remark in pictures.remarks]


def pixels(picture: Picture, data: ImageDataSpec, view: int | None) -> torch.Tensor:
    """(3, resolution, resolution) float32 from -1 to 1: one view of a picture as the VAE takes it.

    Views count from 0; None is the view of a held-out picture, which is its centre as it is.
    """
    return as_tensor(view_of(picture.open(), picture, data, view))


def view_of(image: Image, picture: Picture, data: ImageDataSpec, view: int | None) -> Image:
    """One view of an opened picture: its shorter side resized to the resolution, cropped, perhaps mirrored.

    The views are those of `pixels`.
    The draw depends on `data.seed`, the picture's content and the view alone, and not on the order of pictures.
    """
    from PIL.Image import Resampling, Transpose

    side = data.resolution
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    resized = image.resize((width, height), Resampling.LANCZOS)
    share, mirrored = 0.5, False
    if view is not None:
        drawn = random.Random(f"{data.seed}:{picture.content}:{view}").random()
        share = drawn if data.crop == "random" else 0.5
        mirrored = data.flip and _is_mirrored(picture, data, view)
    left, top = (min(int(share * (length - side + 1)), length - side) for length in (width, height))
    square = resized.crop((left, top, left + side, top + side))
    return square.transpose(Transpose.FLIP_LEFT_RIGHT) if mirrored else square


def as_tensor(square: Image) -> torch.Tensor:
    """(3, height, width) float32 from -1 to 1."""
    import numpy as np
    import torch

    values = torch.from_numpy(np.array(square, dtype=np.float32))
    return (values / 127.5 - 1).permute(2, 0, 1).contiguous()


def _decode(source: ImageSource, data: ImageDataSpec) -> _Decoded | str:
    """The usable picture, or why it is not usable."""
    if source.why_not_read:
        return source.why_not_read
    try:
        content = source.read()
        decoded_file = decoded(content)
    except (OSError, BrokenImageError) as error:
        return f"broken: {first_line(error)}"
    image = decoded_file.image
    smallest = data.resolution if data.min_side is None else data.min_side
    if min(image.size) < smallest:
        return f"too small: {image.width} x {image.height} pixels, and the shorter side must have {smallest}"
    if source.caption is None:
        return source.why_no_caption
    digest = hashlib.sha256(content).hexdigest()
    picture = Picture(source.name, source.caption, image.width, image.height, digest, source.read, decoded_file.traits)
    return _Decoded(picture, look(image))


def _is_mirrored(picture: Picture, data: ImageDataSpec, view: int) -> bool:
    """Of each two views one is mirrored; which one is drawn, but for a centre crop, whose view 0 stays as it is."""
    pair = random.Random(f"{data.seed}:{picture.content}:flip:{view // 2}")
    first = data.crop == "random" and pair.random() < 0.5
    return bool(view % 2) != first


def _split(
    usable: Sequence[_Decoded], data: ImageDataSpec, read: int
) -> tuple[list[Picture], list[Picture], dict[str, str]]:
    """Training and held-out pictures, and the names of those that are neither since they repeat a held-out one.

    Raises:
        DataError: fewer than asked for.
    """
    # Sorted by content, so that renaming or moving a file does not move the split.
    drawn = sorted(usable, key=lambda image: (image.picture.content, image.picture.caption, image.picture.name))
    random.Random(f"{data.seed}:split").shuffle(drawn)
    have = f"{data.path} has {len(drawn)} usable images of {read} read"
    test_count = data.test if isinstance(data.test, int) else math.ceil(round(data.test * len(drawn), 6))
    if test_count > len(drawn):
        raise DataError(f"data.test: {data.test}: {have}; lower data.test, or add images")
    if not test_count:
        raise DataError(f"data.test: {data.test}: {have}, none of which can be held out; add images")
    test, others = drawn[:test_count], drawn[test_count:]
    matches = repeated([image.look for image in others], [image.look for image in test])
    by_content = {image.picture.content: image.picture.name for image in test}
    repeats: dict[str, str] = {}
    train = []
    for image, match in zip(others, matches, strict=True):
        repeated_name = by_content.get(image.picture.content) or (None if match is None else test[match].picture.name)
        if repeated_name is None:
            train.append(image.picture)
        else:
            repeats[image.picture.name] = repeated_name
    everything = isinstance(data.train, float) and data.train == 1.0
    requested = data.train if isinstance(data.train, int) else math.floor(round(data.train * len(drawn), 6))
    count = len(train) if everything else requested
    if not count or count > len(train):
        less = f" and {_images(len(repeats))} that repeat held-out ones ({named(list(repeats))})" if repeats else ""
        raise DataError(
            f"data.train: {data.train}: {have}; without {test_count} held-out ones{less}, {len(train)} remain for "
            f"training, and {'at least 1 is' if everything else f'{requested} are'} asked for; lower data.train or "
            "data.test, write train: 1.0 for all others, or add images"
        )
    return train[:count], [image.picture for image in test], dict(sorted(repeats.items()))


def _key(data: ImageDataSpec, train: Sequence[Picture], test: Sequence[Picture]) -> str:
    contents = [[(picture.content, picture.caption) for picture in split] for split in (train, test)]
    return hashlib.sha256(json.dumps([FORMAT, differing(data), contents], sort_keys=True).encode()).hexdigest()[:24]


def released_key(data: ImageDataSpec) -> str:
    """What release 0.1.0 called the images that are there now, under these settings."""
    pictures, plain = prepare(data), data.plain()
    contents = [[(picture.content, picture.caption) for picture in split] for split in (pictures.train, pictures.test)]
    settings = {key: plain[key] for key in _RELEASED}
    return hashlib.sha256(json.dumps([1, settings, contents], sort_keys=True).encode()).hexdigest()[:24]


_RELEASED = (
    "test", "train", "caption", "split", "seed", "resolution", "crop", "flip", "views", "min_side", "unusable"
)  # fmt: skip


def _images(count: int, kind: str = "") -> str:
    return f"{count} {kind}image{'' if count == 1 else 's'}"
