"""The one place where a picture is opened, whoever asks: calibration, evaluation, reports, figures.

A picture is read as people see it: turned as its EXIF orientation says, deep greys scaled to 8 bits, transparent parts
over white, the first frame of several. Only common picture formats are decoded, and nothing that would fill memory.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.Image import Transpose

from svl.core.errors import SvlError, explained

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")  # none that starts another program
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
TURNS = {  # by EXIF orientation
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
LIMIT = 512 * 2**20  # bytes of a file, and of a decoded picture
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow's, below its own limit: ours counts


def open_picture(source: bytes | str | Path | Image.Image, name: str = "the picture") -> Image.Image:
    """A picture as RGB of 8 bits, decoded.

    Args:
        source: encoded bytes, a regular file, or a picture that is open already.
        name: what messages call it.

    Raises:
        SvlError: if it cannot be read, is of another format than FORMATS, would be larger than LIMIT, or has numbers
            of no known range.
    """
    if isinstance(source, str | Path):
        source = read_picture_file(Path(source), name)
    with explained(f"cannot read {name}"), _whole_pictures_only():
        image = source if isinstance(source, Image.Image) else _identified(source)
        if (size := image.width * image.height * max(4, len(image.getbands()))) > LIMIT:
            raise ValueError(f"{image.width} x {image.height} pixels take {size >> 20} MiB")
        rgb = _in_rgb(image)
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))  # of a TIFF, decoding has turned it already
        upright = rgb if turn is None else rgb.transpose(turn)
        upright.info = {}  # it need not be turned again
        return upright


def read_picture_file(path: Path, name: str) -> bytes:
    """The encoded picture in a file.

    Raises:
        SvlError: if it is no regular file, cannot be read, or is larger than LIMIT; `name` is what messages call the
            picture.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # a pipe or device might never end
            raise SvlError(f"cannot read {name}: '{path}' is no regular file")
        if found.st_size > LIMIT:
            raise SvlError(f"cannot read {name}: '{path}' has {found.st_size >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise SvlError(f"cannot read {name}: '{path}': {error.strerror or error}") from error


@contextmanager
def _whole_pictures_only() -> Iterator[None]:
    """Pillow refuses a cut picture, also after an import (lmms-eval's) told it to fill the rest with grey."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _identified(data: bytes) -> Image.Image:
    """The picture in `data`, of which only the header is read so far."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is none of {', '.join(FORMATS)}") from error


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_in_8_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")  # a new one, whatever it was


def _in_8_bits(values: np.ndarray[Any, Any], mode: str) -> np.ndarray[Any, Any]:
    """Greys of 16 or 32 bits, or fractions, scaled to 0..255.

    Integers of 16 bits fill their range; what has 32 bits reaches up to 1 (fractions), 255 or 65535, whichever is
    enough.
    """
    values = values.astype(np.float64)
    if not (values.min() >= 0 and values.max() <= 65535):  # NaN is neither
        raise ValueError("its greys are not finite numbers from 0 to 65535")
    ranges = (65535.0,) if mode.startswith("I;16") else (1.0, 255.0, 65535.0) if mode == "F" else (255.0, 65535.0)
    largest = next(n for n in ranges if values.max() <= n)
    return np.rint(values * (255.0 / largest)).astype(np.uint8)
