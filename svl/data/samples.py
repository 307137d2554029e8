"""Calibration samples, and how they are read from one's own files.

Parquet or JSON lines with `image` and `prompt` (one user turn), and an optional `answer`; or `text` alone, running text
as it is; or a folder of images.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.core import SvlError, did_you_mean
from svl.core.errors import explained, out_of_memory
from svl.data import pictures
from svl.data.data_folder import check_no_archives

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".parquet", ".jsonl", ".json")
# pictures that are not read: they are named, not passed over
FOREIGN_PICTURES = (
    *(".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpf", ".jpx", ".jxl", ".svg", ".svgz", ".psd", ".eps", ".ai", ".ico"),
    *(".tga", ".pcx", ".exr", ".hdr", ".dds", ".xcf", ".sgi", ".wmf", ".emf", ".dng", ".nef", ".cr2", ".cr3", ".arw"),
    *(".orf", ".rw2", ".raf"),
)
LONGEST_LINE = 2**26  # characters of one JSON line: far more than a prompt, far less than memory
DESCRIBE = "Describe this image."  # what is asked about images without a question


@dataclass(frozen=True)
class Sample:
    """One sample: encoded image (None for text only), the user's turn, the expected answer (may be empty).

    Of `plain` running text, `prompt` is the text; no chat template is put around it, and every token is an answer to
    those before it. `row` (0-based) and `source` say where it was read.
    """

    row: int
    prompt: str
    image_bytes: bytes | None = None
    answer: str = ""
    plain: bool = False
    source: str = ""

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"row {self.row} of '{self.source}'" if self.source else f"calibration row {self.row}"

    @property
    def image(self) -> Image:
        """The decoded RGB image (of a sample that has one)."""
        return pictures.open_picture(self.image_bytes or b"", f"the picture of {self.label}")


@dataclass(frozen=True)
class Samples:
    """A calibration set; `source` names it in messages."""

    source: str
    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def batches(self, size: int) -> list[tuple[Sample, ...]]:
        """The samples in their order, `size` at a time."""
        return [self.samples[i : i + size] for i in range(0, len(self), size)]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every row number, prompt and image, in order: 16 hex digits."""
        return _hash((str(s.row).encode(), s.prompt.encode(), s.image_bytes or b"") for s in self)

    @cached_property
    def answers(self) -> str:
        """Hash of every answer, in order: 16 hex digits."""
        return _hash((s.answer.encode(), str(s.plain).encode()) for s in self)


def _hash(records: Iterable[tuple[bytes, ...]]) -> str:
    digest = hashlib.sha256()
    for part in (part for record in records for part in record):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def read_samples(path: str | Path, n: int | None = None, seed: int = 0, prompt: str | None = None) -> Samples:
    """Read `n` samples (all if None) from a file, in its order; if it has more, a random subset by `seed`.

    `image` may hold encoded bytes, `{"bytes": ..}` as `datasets` writes it, or a path relative to the file. Of a
    folder, the images in it and below (by name, all asked `prompt`), or what its `metadata.jsonl` says with
    `file_name` and `prompt`.

    Raises:
        SvlError: if the file is missing, of another type, empty, without `prompt` (or `image`) column, or an image
            cannot be read (the message names the row).
    """
    path = Path(path).expanduser()
    with out_of_memory(f"reading '{path}'", "split the file"):
        folder, rows = _rows(path, prompt or DESCRIBE)
        if not rows:
            raise SvlError(f"calibration file '{path}' is empty")
        _check_columns(sorted(set().union(*rows)), path)
        numbers = list(range(len(rows)))
        if n is not None and n < len(rows):
            numbers = sorted(random.Random(seed).sample(numbers, n))
        return Samples(str(path), tuple(sample_of_row(rows[i], i, str(path), folder) for i in numbers))


def _rows(path: Path, prompt: str) -> tuple[Path, list[dict[str, Any]]]:
    """The folder that image paths are relative to, and the rows of a file or folder."""
    if (path / "metadata.jsonl").is_file():
        named = [{"image": row.pop("file_name", None), **row} for row in _json_lines(path / "metadata.jsonl")]
        return path, [{"prompt": prompt, **row} for row in named]
    if path.is_dir():
        return path, [{"image": str(file), "prompt": prompt} for file in _pictures(path)]
    if not path.is_file():
        raise SvlError(f"calibration.path: there is no file '{path}'")
    if path.suffix not in SUFFIXES:
        raise SvlError(f"calibration.path: '{path.name}' is not one of {', '.join(SUFFIXES)}")
    return path.parent, _parquet(path) if path.suffix == ".parquet" else _json_lines(path)


def _pictures(folder: Path) -> list[Path]:
    """Pictures in a folder and below, by name and relative to it; hidden ones are left out."""
    inside = sorted(p.relative_to(folder) for p in folder.rglob("*") if not p.is_dir())
    files = [file for file in inside if not any(part.startswith(".") for part in file.parts)]
    if foreign := [str(file) for file in files if file.suffix.lower() in FOREIGN_PICTURES]:
        raise SvlError(
            f"calibration.path: {len(foreign)} pictures in '{folder}' are in a format that is not read, "
            f"'{foreign[0]}' for one; convert them to PNG or JPEG, or move them away"
        )
    check_no_archives(files, folder, "calibration.path")
    if not (found := [file for file in files if file.suffix.lower() in pictures.SUFFIXES]):
        raise SvlError(f"calibration.path: there is no image and no metadata.jsonl in the folder '{folder}'")
    return found


def _check_columns(columns: list[str], path: Path) -> None:
    """Raise SvlError unless there is `text`, or `image` and `prompt`."""
    for column in ("text",) if "text" in columns and "prompt" not in columns else ("image", "prompt"):
        if column not in columns:
            hint = did_you_mean(column, columns)
            raise SvlError(f"calibration file '{path}' has no column '{column}'{hint}; it has: {', '.join(columns)}")


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    with explained(f"calibration file '{path}' is no readable parquet file"):
        return pyarrow.parquet.read_table(path).to_pylist()


def _json_lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    with (
        explained(f"calibration file '{path}' cannot be read as UTF-8 text"),
        path.open(encoding="utf-8", newline="\n") as file,
    ):
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            where = f"calibration file '{path}', line {number}"
            if len(line) > LONGEST_LINE:
                raise SvlError(f"{where}: it is longer than {LONGEST_LINE:,} characters")
            if not line.strip():
                continue
            with explained(where):
                rows.append(json.loads(line))
            if not isinstance(rows[-1], dict):
                raise SvlError(f"{where}: not an object with image and prompt")
    return rows


def sample_of_row(row: dict[str, Any], number: int, source: str, folder: Path) -> Sample:
    """The sample of row `number` of `source`, whose image may be the path of a file in `folder`.

    Raises:
        SvlError: if there is no prompt, or the image cannot be read.
    """
    sample = Sample(number, "", source=source)
    with explained(f"{sample.label} cannot be read"):
        if isinstance(row.get("text"), str) and "prompt" not in row:
            sample = replace(sample, prompt=row["text"], plain=True)
        else:
            if not isinstance(row.get("prompt"), str):
                raise SvlError(f"{sample.label} cannot be read: prompt is not text")
            answer = "" if row.get("answer") is None else str(row["answer"])
            image = _read_image(row.get("image"), folder, sample.label)
            sample = replace(sample, prompt=row["prompt"], answer=answer, image_bytes=image)
        (sample.prompt + sample.answer).encode()  # half of a surrogate pair is no text
    return sample


def _read_image(image: Any, folder: Path, label: str) -> bytes | None:
    """An encoded image, decoded once now: a broken file must not end a long run later."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if image is None:
        return None
    name = f"the picture of {label}"
    if isinstance(image, str):
        name = f"the picture '{image}' of {label}"
        image = pictures.read_picture_file(folder / image, name)
    if not isinstance(image, bytes):
        raise SvlError(f"cannot read {name}: it is neither encoded bytes nor the path of a file")
    pictures.open_picture(image, name)
    return image


def write_samples(samples: Samples, path: Path) -> None:
    """Write samples as a parquet file that `read_samples` reads."""
    import pyarrow.parquet

    if samples.samples[0].plain:
        columns: dict[str, list[Any]] = {"text": [s.prompt for s in samples]}
    else:
        columns = {
            "image": [s.image_bytes for s in samples],
            "prompt": [s.prompt for s in samples],
            "answer": [s.answer for s in samples],
        }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
