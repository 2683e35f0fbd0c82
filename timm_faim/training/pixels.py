"""Image files to 8-bit images of the model's mode, without silent clipping."""
from typing import BinaryIO

import numpy as np
from PIL import Image

# Formats whose integer pixels (I) have 16 bits, and those whose 16-bit ones (I;16) begin at 0. FITS' have a sign.
_SIXTEEN_BITS, _UNSIGNED = ("PNG", "PPM"), ("PNG", "JPEG2000", "IM")
_BITS, _MEANING, _WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags BitsPerSample and PhotometricInterpretation


class PixelRangeError(ValueError):
    """Pixels of a range that is not known."""


def read_image(stream: BinaryIO, mode: str) -> Image.Image:
    """Decode an image and convert it to a mode of 8 bits a channel.

    16-bit pixels are scaled by their range, 0..65535, or 0..4095 of a TIFF of 12 bits: Pillow's own conversion would
    make all from 255 on white.

    Args:
        stream: the file.
        mode: Pillow's name, such as RGB or L.

    Raises:
        PixelRangeError: float pixels, or integers of 32 bits or with a sign, whose black and white nobody knows.
        Exception: whatever Pillow's decoders raise on a damaged file.
    """
    image = Image.open(stream)
    if image.mode != "F" and not image.mode.startswith("I"):
        return image.convert(mode)
    white, inverted = _white_of(image)
    pixels = np.rint(np.asarray(image).clip(0, white) * (255 / white)).astype(np.uint8)
    return Image.fromarray(255 - pixels if inverted else pixels).convert(mode)


def _white_of(image: Image.Image) -> tuple[int, bool]:
    """The highest value of pixels with more than 8 bits, and whether it is black."""
    is_wide = image.mode.startswith("I;16")
    if is_wide and image.format == "TIFF":
        return (1 << image.tag_v2[_BITS][0]) - 1, image.tag_v2.get(_MEANING) == _WHITE_IS_ZERO
    if image.format in (_UNSIGNED if is_wide else _SIXTEEN_BITS) and image.mode != "F":
        return 65535, False
    kind = "float" if image.mode == "F" else f"16-bit {image.format}" if is_wide else "32-bit or signed integer"
    raise PixelRangeError(f"{kind} pixels without a known range; save it with 8 bits a channel, or as a 16-bit PNG")
