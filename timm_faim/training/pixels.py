"""Image files to 8-bit images of the model's mode, without silent clipping."""
from typing import BinaryIO

import numpy as np
from PIL import Image

_SIXTEEN_BITS = ("PNG", "PPM")  # formats whose integer images (mode I) have 16 bits


class PixelRangeError(ValueError):
    """Pixels of a range that is not known."""


def read_image(stream: BinaryIO, mode: str) -> Image.Image:
    """Decode an image and convert it to a mode of 8 bits a channel.

    16-bit pixels are scaled by their range of 0..65535: Pillow's own conversion would make all from 255 on white.

    Args:
        stream: the file.
        mode: Pillow's name, such as RGB or L.

    Raises:
        PixelRangeError: float pixels, or integers of 32 bits, whose black and white are nobody's knowledge.
        Exception: whatever Pillow's decoders raise on a damaged file.
    """
    image = Image.open(stream)
    if image.mode == "F" or (image.mode == "I" and image.format not in _SIXTEEN_BITS):
        kind = "float" if image.mode == "F" else "32-bit integer"
        raise PixelRangeError(f"{kind} pixels without a known range; save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        pixels = np.asarray(image).clip(0, 65535).astype(np.float32)
        image = Image.fromarray(np.rint(pixels / 257).astype(np.uint8))
    return image.convert(mode)
