"""An image file -> its small copy as text, for a page that must not need the file."""

from __future__ import annotations

import base64
import io
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

SIDE = 256
"""Pixels of the longer side, at most."""
_QUALITY = 85


def thumbnail(path: Path) -> str | None:
    """The copy as JPEG in base64; None with a warning if the file is not there or is no image."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except OSError as error:  # FileNotFoundError and PIL's UnidentifiedImageError
        logger.warning("%s: not shown in the report: %s", path, error)
        return None
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
