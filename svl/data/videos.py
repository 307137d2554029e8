"""Videos as pictures: evenly spaced frames of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from svl.core import SvlError
from svl.core.errors import explained
from svl.data.pictures import SUFFIXES as PICTURE_SUFFIXES
from svl.data.pictures import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg")


def read_frame_folder(folder: Path, n: int, name: str) -> list[Image]:
    """As `read_frames`, of a folder with a picture for each frame, in the order of their names.

    Raises:
        SvlError: if there is none, or one of them cannot be read.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)
    if not files:
        raise SvlError(f"cannot read {name}: there is no picture in '{folder}'")
    return [open_picture(files[i], f"{name}, '{files[i].name}'") for i in sorted(evenly_spaced(len(files), n))]


def read_frames(source: Path | IO[bytes], n: int, name: str) -> list[Image]:
    """`n` frames (all, if the video has fewer) from the first to the last, evenly spaced, as RGB pictures.

    Args:
        source: a regular file, or its content.
        n: how many.
        name: what messages call it.

    Raises:
        SvlError: if the package `av` is missing, or the video cannot be read.
    """
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise SvlError(f"cannot read {name}: videos need the package av (pip install 'svl[eval]')") from error
    if isinstance(source, Path) and not source.is_file():
        raise SvlError(f"cannot read {name}: there is no regular file '{source}'")
    found: list[Image] = []
    with explained(f"cannot read {name}"):
        # By decoding them: what the header says of their number is often missing or wrong.
        count = sum(1 for _ in _decoded(source))
        if not count:
            raise ValueError("it has no frames")
        wanted = evenly_spaced(count, n)
        found += [frame.to_image() for i, frame in enumerate(_decoded(source)) if i in wanted]
    return found


def evenly_spaced(count: int, n: int) -> set[int]:
    """`n` of the numbers from 0 to `count` - 1, or all if there are fewer, from the first to the last."""
    return set(np.linspace(0, count - 1, min(n, count)).round().astype(int).tolist())


def _decoded(source: Path | IO[bytes]) -> Iterator[Any]:
    import av

    if not isinstance(source, Path):
        source.seek(0)
    container: Any = av.open(str(source) if isinstance(source, Path) else source)
    with container:
        yield from container.decode(video=0)
