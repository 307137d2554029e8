"""The pictures and the video of a row, however the row holds them."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from svl.core import SvlError
from svl.core.errors import explained
from svl.data import pictures
from svl.data.videos import SUFFIXES as VIDEO_SUFFIXES
from svl.data.videos import read_frames

LONGEST_NAME = 80  # letters of a path that are shown
_DATA_ADDRESS = re.compile(r"data:[\w/+.;=-]*,")
# Base64 of what pictures begin with, or of anything that is longer than a path; neither has a dot.
_HEADS = "iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk|SUkq|TU0A|AAAA"
_BASE64 = re.compile(rf"\s*(({_HEADS})[A-Za-z0-9+/\s]{{40,}}|[A-Za-z0-9+/\s]{{256,}})={{0,2}}\s*")


def encoded_pictures(field: Any, folder: Path, label: str) -> tuple[bytes, ...]:
    """The encoded pictures of a row's field, each decoded once: a broken one must not end a long run later.

    Args:
        field: None, a picture or a list of pictures. A picture is encoded bytes, {"bytes", "path"} as `datasets` has
            it, the path of a file in `folder`, base64, or a `data:` address.
        folder: what paths are relative to.
        label: what messages call the row.

    Raises:
        SvlError: if a picture is something else or cannot be read.
    """
    found = field if isinstance(field, list | tuple) else [field]
    return tuple(_read_picture(picture, folder, label) for picture in found if not _is_missing(picture))


def encoded_frames(field: Any, folder: Path, label: str, frames: int) -> tuple[bytes, ...]:
    """The encoded frames of a row's video: of a file, `frames` evenly spaced ones; of a list of pictures, all.

    Raises:
        SvlError: if it is neither or cannot be read.
    """
    if isinstance(field, list | tuple) and len(field) == 1 and _is_video_file(field[0]):
        field = field[0]
    if _is_missing(field):
        return ()
    if isinstance(field, list | tuple):
        return encoded_pictures(field, folder, label)
    name = f"the video of {label}"
    if isinstance(field, dict):
        field = field.get("bytes") or field.get("path")
    if isinstance(field, str):
        name = f"the video {_quoted(field)} of {label}"
        with _placed(field, folder):
            return tuple(_encoded(frame) for frame in read_frames(folder / field, frames, name))
    if isinstance(field, bytes):
        field = io.BytesIO(field)
    else:
        raise SvlError(f"cannot read {name}: it is neither the path of a file nor a list of frames")
    return tuple(_encoded(frame) for frame in read_frames(field, frames, name))


def _is_missing(field: Any) -> bool:
    return field is None or (isinstance(field, dict) and not field.get("bytes") and not field.get("path"))


def _is_video_file(field: Any) -> bool:
    path = field.get("path") if isinstance(field, dict) else field
    return isinstance(path, str) and Path(path[-20:]).suffix.lower() in VIDEO_SUFFIXES


def _read_picture(picture: Any, folder: Path, label: str) -> bytes:
    name = f"the picture of {label}"
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, Image.Image):
        return _encoded(pictures.open_picture(picture, name))
    if isinstance(picture, str):
        picture, name = _read_text(picture, folder, name, label)
    if not isinstance(picture, bytes):
        raise SvlError(f"cannot read {name}: it is neither encoded bytes nor the path of a file")
    pictures.open_picture(picture, name)
    return picture


def _read_text(text: str, folder: Path, name: str, label: str) -> tuple[bytes, str]:
    """The picture that a text holds or names, and what messages call it; they never show an encoded picture."""
    if address := _DATA_ADDRESS.match(text):
        if not address[0].endswith(";base64,"):
            raise SvlError(f"cannot read {name}: its data: address is not in base64")
        text = text[address.end() :]
    elif not _BASE64.fullmatch(text):
        name = f"the picture {_quoted(text)} of {label}"
        if re.match(r"https?://", text):
            raise SvlError(f"cannot read {name}: it is an address; download the pictures and give their paths")
        with _placed(text, folder):
            return pictures.read_picture_file(folder / text, name), name
    with explained(f"cannot read {name}: it is no base64"):
        return base64.b64decode("".join(text.split()), validate=True), name


@contextmanager
def _placed(path: str, folder: Path) -> Iterator[None]:
    """Within the block, an error of reading a file that is not in `folder` names the setting that moves it."""
    try:
        yield
    except SvlError as error:
        if os.path.isabs(path) or os.path.exists(folder / path):
            raise
        raise SvlError(f"{error} (calibration.images names the folder that paths start from)") from error


def _quoted(path: str) -> str:
    return f"'{path}'" if len(path) <= LONGEST_NAME else f"'...{path[-LONGEST_NAME:]}'"


def _encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png", compress_level=1)
    return file.getvalue()


def as_list(field: Any) -> Sequence[Any]:
    """A field that may hold one thing or several, as a sequence."""
    if field is None:
        return ()
    return field if isinstance(field, list | tuple) else [field]
