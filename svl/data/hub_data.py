"""Calibration samples drawn from a data set of the hub, or a copy of it.

Data sets are streamed through `datasets`, of which nothing but the rows looked at is fetched.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from svl.core import SvlError
from svl.core.errors import explained
from svl.data.data_folder import find_data_files
from svl.data.row_formats import FORMATS, Row, RowContent, RowOptions, read_row
from svl.data.sample_files import fill_sample
from svl.data.samples import Sample, Samples

BUFFER = 1000  # rows of a streamed data set among which the next one is drawn
CHARACTERS = 2000  # of running text in one sample, at least: about 500 tokens


@dataclass(frozen=True)
class HubSource:
    """What is drawn from a data set.

    Attributes:
        path: hub id, or folder with a copy.
        n: how many; a data set is too large for all.
        seed: of the order in which it is streamed, shuffled within a buffer of BUFFER rows.
        name: configuration of the data set.
        split: its part.
        revision: hub branch, tag or commit.
        image_table: {"name": .., "column": ..}: the configuration that holds the images by `id`, if they are not in the
            rows, and the column that names them. The first `n` images are drawn, and the first question on each.
        options: how rows become samples; needs a format.

    Raises:
        SvlError: if `n` is None, or there is no format.
    """

    path: str
    n: int | None
    seed: int = 0
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    image_table: dict[str, str] | None = None
    options: RowOptions = field(default_factory=RowOptions)

    def __post_init__(self) -> None:
        if self.options.format is None:
            known = ", ".join(FORMATS)
            raise SvlError(f"calibration.format is not set: say how rows of '{self.path}' are read ({known})")
        if self.n is None:
            raise SvlError(f"calibration.samples is not set: say how many samples of '{self.path}' are wanted")


def draw_samples(source: HubSource) -> Samples:
    """The first samples of a data set, streamed in an order drawn by the seed.

    Raises:
        SvlError: if the data set, its split or a column is not there, or it has too few samples.
    """
    n = source.n or 0
    with explained(f"calibration.path: cannot read '{source.path}'"):
        contents: Iterable[RowContent]
        if source.options.format == "text":
            contents = _passages(source, n)
        elif source.image_table:
            images, questions = _stream(source, source.image_table["name"]), _stream(source, source.name, False)
            contents = _contents(source, _joined(images, questions, n, source.image_table["column"]))
        else:
            contents = _contents(source, _stream(source, source.name))
        found = list(islice(contents, n))
    if len(found) < n:
        raise SvlError(
            f"data set '{source.path}' has {len(found)} samples in '{source.split}', but calibration.samples is {n}"
        )
    folder, frames = source.options.images or Path(), source.options.frames
    numbered = (Sample(i, "", source=source.path) for i in range(n))
    filled = (fill_sample(sample, content, folder, frames) for sample, content in zip(numbered, found, strict=True))
    return Samples(source.path, tuple(filled))


def _stream(source: HubSource, name: str | None, shuffled: bool = True) -> Any:
    """Rows of a configuration of a data set, with images as they are stored."""
    import datasets

    folder = Path(source.path).expanduser()
    if folder.is_dir():
        builder, files = find_data_files(folder.absolute(), name)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # reading a copy is no download to tell the hub of
        rows: Any = datasets.load_dataset(builder, data_files=files, split=source.split, streaming=True)
    else:
        rows = datasets.load_dataset(source.path, name, split=source.split, revision=source.revision, streaming=True)
    for column, feature in (rows.features or {}).items():
        if (encoded := left_encoded(feature)) != feature:
            rows = rows.cast_column(column, encoded)
    return rows.shuffle(seed=source.seed, buffer_size=BUFFER) if shuffled else rows


def _contents(source: HubSource, rows: Iterable[Row]) -> Iterator[RowContent]:
    """What the rows say that make samples."""
    for i, row in enumerate(rows):
        if i == 0:
            source.options.check_columns(row)
        with explained(f"a row of data set '{source.path}' does not fit calibration.format={source.options.format}"):
            content = read_row(row, str(source.options.format), source.options)
        if content is not None:
            yield content


def left_encoded(feature: Any) -> Any:
    """A feature of `datasets` that leaves pictures, wherever they are in it, as they are stored.

    `datasets` would open any format, and what is left of a cut picture.
    """
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(left_encoded(feature.feature))
    if isinstance(feature, dict):
        return {name: left_encoded(inner) for name, inner in feature.items()}
    return feature


def _passages(source: HubSource, n: int) -> list[RowContent]:
    """`n` passages of running text, drawn from the first 10 n."""
    lines = (content.prompt for content in _contents(source, _stream(source, source.name, False)))
    texts = list(islice(_texts(lines), 10 * n))
    chosen = sorted(random.Random(source.seed).sample(range(len(texts)), min(n, len(texts))))
    return [RowContent(texts[i], plain=True) for i in chosen]


def _joined(images: Iterable[Row], questions: Iterable[Row], n: int, key: str) -> Iterator[Row]:
    """The first question on each of the first `n` images, in the order of the images."""
    pictures = {row["id"]: row["image"] for row in islice(images, n)}
    asked: dict[Any, Row] = {}
    for row in questions:
        if row[key] in pictures and row[key] not in asked:
            asked[row[key]] = row
            if len(asked) == len(pictures):
                break
    return ({**asked[i], "image": picture} for i, picture in pictures.items() if i in asked)


def _texts(lines: Iterable[str]) -> Iterator[str]:
    """Running text of at least CHARACTERS, from lines: paragraphs whole, headings and empty lines left out."""
    text = ""
    for line in map(str.strip, lines):
        if line and not line.startswith("="):
            text = f"{text}\n{line}" if text else line
            if len(text) >= CHARACTERS:
                yield text
                text = ""
