"""The bytes of an image file -> the picture that a person sees: upright, in RGB, on white, with what was done to it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_peft.errors import first_line
from ray_peft.foundation.substitutes import HEAD, substitute

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

FRAMES = "several frames"
"""Of an animated image, or of a file with several pages, the first one is used."""
TRANSPARENT = "transparent"
"""What lies behind an image's transparent parts is white."""


class BrokenImageError(Exception):
    """An image that cannot be decoded; the text is the reason."""


@dataclass(frozen=True)
class Decoded:
    """A whole image."""

    image: Image
    """Upright, in RGB."""
    traits: tuple[str, ...]
    """The parts of the file that are not in `image`: FRAMES, TRANSPARENT."""


def decoded(content: bytes) -> Decoded:
    """The image in a file's bytes.

    Raises:
        BrokenImageError: the bytes are not a whole image.
    """
    import PIL.Image
    from PIL import ImageOps

    try:
        with PIL.Image.open(io.BytesIO(content)) as image:
            # A photograph of a telephone (MPO) holds a depth map or a preview beside the picture.
            several = image.format != "MPO" and bool(getattr(image, "is_animated", False))
            image.seek(0)
            image.load()
            rgb, transparent = _rgb(ImageOps.exif_transpose(image))
    except BrokenImageError:
        raise
    except Exception as error:  # the decoders of PIL raise a dozen unrelated types
        # PIL names the buffer by its address in memory, which says nothing and changes each time.
        unknown = isinstance(error, PIL.UnidentifiedImageError)
        reason = substitute(content[:HEAD]) or "not an image of a known kind" if unknown else first_line(error)
        raise BrokenImageError(reason) from None
    return Decoded(rgb, (FRAMES,) * several + (TRANSPARENT,) * transparent)


def _rgb(image: Image) -> tuple[Image, bool]:
    """The image in RGB, and whether parts of it were transparent."""
    import numpy as np
    import PIL.Image

    if image.mode.startswith("I;16"):
        return _of_16_bits(np.asarray(image), image.info.get("transparency"))
    if image.mode in ("I", "F"):
        raise BrokenImageError("32-bit pixels, of which no file says what is white; save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB"), False
    with_alpha = image.convert("RGBA")
    ground = PIL.Image.new("RGBA", image.size, "white")
    clear = bool((np.asarray(with_alpha.getchannel("A")) < 255).any())
    return PIL.Image.alpha_composite(ground, with_alpha).convert("RGB"), clear


def _of_16_bits(values: np.ndarray, transparent: object) -> tuple[Image, bool]:
    """The upper 8 of 16 bits, which PIL would cut off at 255; the grey value `transparent` becomes white."""
    import numpy as np
    import PIL.Image

    grey = (values.astype(np.uint32) // 257).astype(np.uint8)
    clear = values == transparent if isinstance(transparent, int) else np.zeros(values.shape, bool)
    return PIL.Image.fromarray(np.where(clear, np.uint8(255), grey)).convert("RGB"), bool(clear.any())
