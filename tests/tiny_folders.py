"""Folders of small images with captions, and what the preparation makes of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ray_peft.errors import DataError
from ray_peft.spec.text_to_image import ImageDataSpec
from ray_peft.tasks.text_to_image.data import Pictures, prepare


def spec(folder: Path | str, **settings: Any) -> ImageDataSpec:
    return ImageDataSpec.from_plain({"path": str(folder), "test": 3, "resolution": 64, **settings})


def names(pictures: Pictures) -> tuple[list[str], list[str]]:
    return [picture.name for picture in pictures.train], [picture.name for picture in pictures.test]


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refusal(data: ImageDataSpec) -> str:
    with pytest.raises(DataError) as caught:
        prepare(data)
    return str(caught.value)


def add(folder: Path, name: str, content: bytes, caption: str = "one more") -> None:
    (folder / name).write_bytes(content)
    with (folder / "metadata.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"file_name": name, "text": caption}) + "\n")


def side_by_side(width: int = 80, height: int = 64) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), (200, 0, 0))
    image.paste((0, 0, 200), (width // 2, 0, width, height))
    return image
