"""Generated images -> the files of a trial's folder: each image, a grid of all, and a list of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from ray_peft.metrics.scores import ImageFile
from ray_peft.tasks.base import GeneratedImage

IMAGES = "images"
"""The folder below a trial's own, and the folder of its artifacts."""
LIST_FILE = "images.json"


def write_images(images: Sequence[GeneratedImage], folder: Path) -> list[ImageFile]:
    """Write p00_s0.png (after training), p00_s0_before.png (the base), grid.png and images.json; returns the list.

    Prompts are numbered in their order. Files that an earlier run of the trial left in `folder` are removed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prompts = list(dict.fromkeys(image.prompt for image in images))
    files = [_write(image, f"p{prompts.index(image.prompt):02d}_s{image.seed}", folder) for image in images]
    _grid(images, prompts, folder / "grid.png")
    (folder / LIST_FILE).write_text(json.dumps([file.plain() for file in files], indent=2), encoding="utf-8")
    return files


def _write(image: GeneratedImage, stem: str, folder: Path) -> ImageFile:
    image.after.save(folder / f"{stem}.png")
    if image.before is not None:
        image.before.save(folder / f"{stem}_before.png")
    return ImageFile(
        prompt=image.prompt,
        seed=image.seed,
        file=f"{stem}.png",
        before=f"{stem}_before.png" if image.before is not None else None,
        nearest=image.nearest,
        nearest_likeness=image.nearest_likeness,
    )


def _grid(images: Sequence[GeneratedImage], prompts: Sequence[str], path: Path) -> None:
    """A row for each prompt; for each seed a column, or two where there is a picture of the base."""
    from ray_peft.tasks.image_grid import grid

    by_prompt_and_seed = {(image.prompt, image.seed): image for image in images}
    seeds = list(dict.fromkeys(image.seed for image in images))
    compared = any(image.before is not None for image in images)
    columns = [f"seed {seed}, {when}" if compared else f"seed {seed}" for seed in seeds for when in _moments(compared)]
    rows = [
        [
            None
            if (image := by_prompt_and_seed.get((prompt, seed))) is None
            else image.before
            if when == "before"
            else image.after
            for seed in seeds
            for when in _moments(compared)
        ]
        for prompt in prompts
    ]
    grid(rows, prompts, columns).save(path)


def _moments(compared: bool) -> list[str]:
    return ["before", "after"] if compared else ["after"]
