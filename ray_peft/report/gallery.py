"""The section on made images: every prompt and seed, side by side over all trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_peft.metrics.scores import ImageFile
from ray_peft.report.digits import count, fixed
from ray_peft.report.document import Block, Gallery, Paragraph, Picture, Table
from ray_peft.report.material import Material
from ray_peft.report.table import Row, is_base
from ray_peft.report.thumbnails import thumbnail

MOST = 200
"""Pictures that a report shows: each is a copy of 10 to 20 KiB inside its page."""
_WHERE = (
    "One line for each prompt and seed, the same initial noise for all trials. Whole images are in "
    "trials/<trial id>/images of this report's folder and among the artifacts of each trial's MLflow run (images); "
    "grid.png there holds all of a trial. report.html has small copies in it; report.md shows the files and needs "
    "that folder beside it."
)
_NEAREST = (
    "The made image of each trial that is nearest to a training painting in content (cosine of the two in squares of 8 "
    "pixels, less their mean colours; 1 is a copy)."
)


@dataclass(frozen=True)
class _Column:
    label: str
    trial_id: str
    files: dict[tuple[str, int], str]
    """By prompt and seed, the file in the trial's folder of images."""


def images(material: Material) -> list[Block]:
    """The gallery, and each trial's image that is nearest to a painting; nothing if no trial made images."""
    rows = sorted((row for row in material.rows if material.images.get(row.trial_id)), key=_base_first)
    if not rows:
        return []
    columns = _columns(rows, material)
    places = list(dict.fromkeys(place for column in columns for place in column.files))
    total = sum(len(column.files) for column in columns)
    shown_columns = columns[:MOST]
    shown_places: list[tuple[str, int]] = []
    picture_count = 0
    for place in places:
        picture_count += sum(place in column.files for column in shown_columns)
        if picture_count > MOST:
            break
        shown_places.append(place)
    lines = tuple(
        (f"{prompt} (seed {seed})", tuple(_picture(column, (prompt, seed), material) for column in shown_columns))
        for prompt, seed in shown_places
    )
    picture_count = sum(picture is not None for _, pictures in lines for picture in pictures)
    gallery = Gallery(header=("Prompt", *(column.label for column in shown_columns)), lines=lines)
    omitted = f" Shown are {count(picture_count)} of {count(total)} images; the others are in those folders." * (
        picture_count < total
    )
    return [gallery, Paragraph(_WHERE + omitted), *_nearest(rows, material)]


def _base_first(row: Row) -> bool:
    return not is_base(row.result)


def _columns(rows: Sequence[Row], material: Material) -> list[_Column]:
    """One a trial; where there is no row of the untouched base, what a trial kept of it comes first."""
    columns = [_Column(row.label, row.trial_id, _files(material.images[row.trial_id])) for row in rows]
    bases = [(row, _files(material.images[row.trial_id], before=True)) for row in rows]
    before = next(((row, files) for row, files in bases if files), None)
    if before is None or is_base(rows[0].result):
        return columns
    row, files = before
    return [_Column(f"without fine-tuning (before {row.label})", row.trial_id, files), *columns]


def _files(images: Sequence[ImageFile], *, before: bool = False) -> dict[tuple[str, int], str]:
    files = {(image.prompt, image.seed): image.before if before else image.file for image in images}
    return {place: file for place, file in files.items() if file is not None}


def _picture(column: _Column, place: tuple[str, int], material: Material) -> Picture | None:
    if place not in column.files:
        return None
    file = f"trials/{column.trial_id}/images/{column.files[place]}"
    jpeg = thumbnail(material.folder / file) if material.folder is not None else None
    return Picture(file=file, alt=f"{column.label}: {place[0]}, seed {place[1]}", jpeg=jpeg)


def _nearest(rows: Sequence[Row], material: Material) -> list[Block]:
    lines = []
    for row in rows:
        nearest = [
            (image.nearest_likeness, image.nearest, image)
            for image in material.images[row.trial_id]
            if image.nearest_likeness is not None and image.nearest is not None
        ]
        if nearest:
            likeness, painting, image = max(nearest, key=lambda entry: entry[0])
            lines.append((row.label, f"{image.prompt} (seed {image.seed})", painting, fixed(likeness, 4)))
    header = ("Trial", "Image", "Nearest training painting", "Likeness")
    return [Paragraph(_NEAREST), Table(header=header, lines=tuple(lines), text_columns=3)] if lines else []
