"""Small encoded pictures, each of one colour, that tests tell apart."""

from __future__ import annotations

import base64
import io

from PIL import Image

COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]


def picture(color, mode: str = "RGB", kind: str = "png", size: tuple[int, int] = (4, 4)) -> bytes:
    """An encoded picture."""
    file = io.BytesIO()
    Image.new("RGB", size, color).convert(mode).save(file, kind)
    return file.getvalue()


PICTURES = [picture(color) for color in COLORS]
BASE64 = [base64.b64encode(picture).decode() for picture in PICTURES]


def colors(sample) -> list[tuple[int, int, int]]:
    """The colour of each of a sample's pictures."""
    return [image.getpixel((0, 0)) for image in sample.pictures]
