"""The prepared images for people to look at: counts, JSON lines, and the view of each that the UNet sees."""

from __future__ import annotations

import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ray_peft.foundation.whole import write_text
from ray_peft.spec.text_to_image import ImageDataSpec, ImageTrialSpec
from ray_peft.tasks.base import DataReport, SplitReport
from ray_peft.tasks.text_to_image.data import Picture, Pictures, notes, prepare, view_of
from ray_peft.tasks.text_to_image.listing import NAMED_AT_MOST

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL = 128
"""Pixels of both sides of an image in a contact sheet."""
COLUMNS = 10
"""Images in a row of a contact sheet."""


def data_report(spec: ImageTrialSpec) -> DataReport:
    """Prepare the images of a trial and count them.

    Raises:
        DataError: images or metadata are missing, malformed or too few.
    """
    data = spec.data
    pictures = prepare(data)
    settings = data.plain()
    keys = ("resolution", "crop", "flip", "views", "seed")
    return DataReport(
        key=pictures.key,
        settings={key: settings[key] for key in keys},
        read={data.path: pictures.read},
        unusable={data.path: dict(Counter(reason.partition(":")[0] for reason in pictures.unusable.values()))},
        splits=[
            _split_report(data, "train", pictures.train, repeats=len(pictures.repeats)),
            _split_report(data, "test", pictures.test, repeats=0),
        ],
        overlap={"repeats": pictures.repeats},
        overlap_lines=_overlap_lines(pictures),
        remarks=notes(pictures, data)[1:],  # the first one counts what the table counts
    )


def write_data(spec: ImageTrialSpec, folder: Path) -> list[Path]:
    """Write train.jsonl, test.jsonl, and contact sheets of the first views, train.png and test.png."""
    pictures = prepare(spec.data)
    written = []
    for split, chosen in (("train", pictures.train), ("test", pictures.test)):
        lines = [
            {"file_name": picture.name, "caption": picture.caption, "width": picture.width, "height": picture.height}
            for picture in chosen
        ]
        written.append(folder / f"{split}.jsonl")
        write_text(written[-1], "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
        sheet = io.BytesIO()
        _contact_sheet(chosen, spec.data, 0 if split == "train" else None).save(sheet, "PNG")
        written.append(folder / f"{split}.png")
        written[-1].write_bytes(sheet.getvalue())
    return written


def _split_report(data: ImageDataSpec, split: str, chosen: Sequence[Picture], *, repeats: int) -> SplitReport:
    return SplitReport(data.path, split, len(chosen), 0, 0, repeats, tokens=None, longest=None, trained_tokens=None)


def _overlap_lines(pictures: Pictures) -> list[str]:
    count = f"{len(pictures.repeats):,} training images repeat held-out images and are left out"
    pairs = [f"{name} shows the same as {held_out}" for name, held_out in pictures.repeats.items()]
    more = [f"and {len(pairs) - NAMED_AT_MOST:,} more"] if len(pairs) > NAMED_AT_MOST else []
    return [count, *pairs[:NAMED_AT_MOST], *more]


def _contact_sheet(chosen: Sequence[Picture], data: ImageDataSpec, view: int | None) -> Image:
    """One view of each picture, row by row."""
    import PIL.Image

    columns = min(COLUMNS, len(chosen))
    sheet = PIL.Image.new("RGB", (columns * THUMBNAIL, math.ceil(len(chosen) / columns) * THUMBNAIL), "white")
    for index, picture in enumerate(chosen):
        row, column = divmod(index, columns)
        square = view_of(picture.open(), picture, data, view).resize(
            (THUMBNAIL, THUMBNAIL), PIL.Image.Resampling.LANCZOS
        )
        sheet.paste(square, (column * THUMBNAIL, row * THUMBNAIL))
    return sheet
