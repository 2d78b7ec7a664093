"""Images side by side in one picture, with prompts to the left and names above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

CELL = 256
"""Pixels of the longer side of an image in the grid; smaller images keep their size."""
LABEL = 200
"""Pixels of width for the prompts."""
_FONT = 15
_GAP = 8


def grid(images: Sequence[Sequence[Image | None]], rows: Sequence[str], columns: Sequence[str]) -> Image:
    """A picture of all images.

    Args:
        images: rows of as many images as there are `columns`; None leaves a place empty.
        rows: a label each, wrapped to the left of the row; without any text the space is saved.
        columns: a label each, above.
    """
    from PIL import Image as images_of
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT)
    pictures = [image for row in images for image in row if image is not None]
    cell = min(CELL, max((side for image in pictures for side in image.size), default=CELL))
    left = LABEL if any(rows) else 0
    heads = [_wrapped(label, cell, font) for label in columns]
    line = _FONT + 4
    top = max((head.count("\n") + 1 for head in heads), default=0) * line + _GAP
    sides = [_wrapped(label, left - _GAP, font) for label in rows]
    heights = [max(cell, (side.count("\n") + 1) * line) for side in sides]
    size = (left + len(columns) * (cell + _GAP), top + sum(heights) + _GAP * len(heights))
    picture = images_of.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for place, head in enumerate(heads):
        draw.multiline_text((left + place * (cell + _GAP), _GAP // 2), head, fill="black", font=font)
    y = top
    for row, side, height in zip(images, sides, heights, strict=True):
        draw.multiline_text((_GAP // 2, y), side, fill="black", font=font)
        for place, image in enumerate(row):
            if image is not None:
                small = image.convert("RGB")
                small.thumbnail((cell, cell))
                picture.paste(small, (left + place * (cell + _GAP), y))
        y += height + _GAP
    return picture


def _wrapped(text: str, width: int, font: FreeTypeFont | ImageFont) -> str:
    """`text` in lines of at most `width` pixels; a word that is longer is broken."""
    lines = [""]
    for word in text.split():
        for piece in _pieces(word, width, font):
            longer = f"{lines[-1]} {piece}".strip()
            if font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(piece)
    return "\n".join(line for line in lines if line)


def _pieces(word: str, width: int, font: FreeTypeFont | ImageFont) -> list[str]:
    pieces = [""]
    for character in word:
        if pieces[-1] and font.getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces
