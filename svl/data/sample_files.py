"""Calibration samples read from one's own files."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from svl.core import SvlError
from svl.core.errors import explained, out_of_memory
from svl.data.own_files import open_table
from svl.data.picture_fields import encoded_frames, encoded_pictures
from svl.data.row_formats import RowContent, RowOptions, find_format, read_row, with_whole_numbers
from svl.data.samples import IMAGE_MARK, VIDEO_MARK, Sample, Samples
from svl.data.tables import Table


def read_samples(path: str | Path, n: int | None = None, seed: int = 0, options: RowOptions | None = None) -> Samples:
    """Read `n` samples (all if None) from a file or folder, in its order; if it has more, a random subset by `seed`.

    Only the rows drawn are read. Files: parquet, JSON lines, a JSON array, COCO captions, CSV (see `own_files`);
    folders of such files, of pictures, or of pictures with a metadata file. Rows: see `row_formats`; pictures in them:
    see `picture_fields`.

    Raises:
        SvlError: if the file is missing, of another kind, or empty, a column is missing, or a row cannot be read; the
            message names the row.
    """
    path, options = Path(path).expanduser(), options or RowOptions()
    with out_of_memory(f"reading '{path}'", "split the file"):
        table = open_table(path)
        if not len(table):
            raise SvlError(f"calibration file '{path}' is empty")
        numbers = list(range(len(table)))
        if n is not None and n < len(table):
            numbers = sorted(random.Random(seed).sample(numbers, n))
        folder = options.images or (path if path.is_dir() else path.parent)
        return Samples(str(path), tuple(_samples(table, numbers, folder, options)))


def _samples(table: Table, numbers: list[int], folder: Path, options: RowOptions) -> Iterator[Sample]:
    rows = with_whole_numbers(list(table.rows(numbers)))
    with explained(f"calibration file '{table.path}'"):
        row_format = find_format(dict.fromkeys(column for row in rows for column in row), options)
    for number, row in zip(numbers, rows, strict=True):
        sample = Sample(number, "", source=str(table.path))
        with explained(f"{sample.label} cannot be read"):
            content = read_row(row, row_format, options)
        if content is not None:
            yield fill_sample(sample, content, folder, options.frames)


def fill_sample(sample: Sample, content: RowContent, folder: Path, frames: int) -> Sample:
    """The sample (so far a row and a source) of what its row says; paths of pictures are relative to `folder`.

    Raises:
        SvlError: if a picture or the video cannot be read, or the texts have marks for other pictures than there are.
    """
    with explained(f"{sample.label} cannot be read"):
        texts = (content.prompt, *(text for _, text in content.earlier))
        answer = content.answer or ""
        "".join((*texts, answer)).encode()  # half of a surrogate pair is no text
        found = replace(
            sample,
            prompt=content.prompt,
            answer=answer,
            plain=content.plain,
            earlier=content.earlier,
            images=encoded_pictures(content.images, folder, sample.label),
            frames=encoded_frames(content.video, folder, sample.label, frames),
        )
    if not found.plain:
        _check_marks(found, IMAGE_MARK, len(found.images), "pictures")
        _check_marks(found, VIDEO_MARK, bool(found.frames), "videos")
    return found


def _check_marks(sample: Sample, mark: str, n: int, what: str) -> None:
    texts = (sample.prompt, *(text for _, text in sample.earlier))
    marks = sum(text.count(mark) for text in texts)
    if marks not in (0, n):
        found = f"{mark} stands {marks} times in its texts, but it has {n} {what}"
        raise SvlError(f"{sample.label} cannot be read: {found}")
