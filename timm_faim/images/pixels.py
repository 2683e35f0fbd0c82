"""Image files to 8-bit images of the model's mode, without silent clipping."""

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from timm_faim.run.errors import RankError

# Formats whose integer pixels (I) have 16 bits, and those whose 16-bit ones (I;16) begin at 0. FITS' have a sign.
_SIXTEEN_BITS, _UNSIGNED = ("PNG", "PPM"), ("PNG", "JPEG2000", "IM")
_BITS, _MEANING, _WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags BitsPerSample and PhotometricInterpretation


class PixelRangeError(ValueError):
    """Pixels of a range that is not known."""


def mode_of(channels: int) -> str:
    """Pillow's mode of images for a model of so many input channels."""
    return "L" if channels == 1 else "RGB"


def read_image(source: BinaryIO | Image.Image, mode: str) -> Image.Image:
    """Decode an image and convert it to a mode of 8 bits a channel.

    16-bit pixels are scaled by their range, 0..65535, or 0..4095 of a TIFF of 12 bits: Pillow's own conversion would
    make all from 255 on white.

    Args:
        source: the file, or an image that Pillow opened.
        mode: Pillow's name, such as RGB or L.

    Raises:
        ValueError: PostScript, which would be run as a program.
        PixelRangeError: float pixels, or integers of 32 bits or with a sign, whose black and white nobody knows.
        Exception: whatever Pillow's decoders raise on a damaged file.
    """
    image = source if isinstance(source, Image.Image) else Image.open(source)
    if image.format == "EPS":
        raise ValueError("PostScript is a program; save it as PNG")
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


class InMode:
    """timm's reader of a stream of images in whatever mode they are stored, with the images as `read_image` makes them.

    Raises:
        RankError: while it is read, an image whose black and white nobody knows.
    """

    def __init__(self, reader: Any, mode: str) -> None:
        self.reader, self.mode = reader, mode

    def __getattr__(self, name: str) -> Any:
        if name == "reader":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.reader, name)

    def __len__(self) -> int:
        return len(self.reader)

    def __iter__(self) -> Iterator[tuple[Image.Image, Any]]:
        for image, target in self.reader:
            try:
                yield read_image(image, self.mode), target
            except PixelRangeError as e:
                raise RankError(f"cannot use an image of the stream: {e}") from e
