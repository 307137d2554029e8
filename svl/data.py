"""Calibration samples from local files: parquet or JSON lines.

Columns `image` and `prompt` (one user turn), and an optional `answer`; or `text` alone, running text as it is.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from svl.core import SvlError, did_you_mean

SUFFIXES = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class Example:
    """One sample: encoded image (None for text only), the user's turn, the expected answer (may be empty).

    Of `plain` running text, `prompt` is the text; no chat template is put around it, and every token is an answer to
    those before it.
    """

    row: int
    prompt: str
    image_bytes: bytes | None = None
    answer: str = ""
    plain: bool = False

    @property
    def image(self) -> Image.Image:
        """The decoded RGB image (of an example that has one)."""
        return Image.open(io.BytesIO(self.image_bytes or b"")).convert("RGB")


@dataclass(frozen=True)
class Examples:
    """A calibration set; `source` names it in messages."""

    source: str
    items: tuple[Example, ...]

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every row number, prompt and image, in order: 16 hex digits."""
        return _hash((str(e.row).encode(), e.prompt.encode(), e.image_bytes or b"") for e in self.items)

    @cached_property
    def answers(self) -> str:
        """Hash of every answer, in order: 16 hex digits."""
        return _hash((e.answer.encode(), str(e.plain).encode()) for e in self.items)


def _hash(records: Iterable[tuple[bytes, ...]]) -> str:
    digest = hashlib.sha256()
    for part in (part for record in records for part in record):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def read_samples(path: str | Path, n: int | None = None, seed: int = 0) -> Examples:
    """Read `n` samples (all if None) from a file, in its order; if it has more, a random subset by `seed`.

    `image` may hold encoded bytes, `{"bytes": ..}` as `datasets` writes it, or a path relative to the file.

    Raises:
        SvlError: if the file is missing, of another type, empty, without `prompt` (or `image`) column, or an image
            cannot be read (the message names the row).
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise SvlError(f"calibration.path: there is no file '{path}'")
    if path.suffix not in SUFFIXES:
        raise SvlError(f"calibration.path: '{path.name}' is not one of {', '.join(SUFFIXES)}")
    rows = _parquet(path) if path.suffix == ".parquet" else _json_lines(path)
    if not rows:
        raise SvlError(f"calibration file '{path}' is empty")
    columns = sorted(set().union(*rows))
    for column in ("text",) if "text" in columns and "prompt" not in columns else ("image", "prompt"):
        if column not in columns:
            hint = did_you_mean(column, columns)
            raise SvlError(f"calibration file '{path}' has no column '{column}'{hint}; it has: {', '.join(columns)}")
    numbers = list(range(len(rows)))
    if n is not None and n < len(rows):
        numbers = sorted(random.Random(seed).sample(numbers, n))
    return Examples(str(path), tuple(_example(rows[i], i, path) for i in numbers))


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise SvlError(f"calibration file '{path}' is no readable parquet file: {error}") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would also split at U+2028 within a text
    except UnicodeDecodeError as error:
        raise SvlError(f"calibration file '{path}' is not UTF-8 text: {error}") from error
    rows = []
    for number, line in enumerate(lines):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise SvlError(f"calibration file '{path}', line {number + 1}: {error}") from error
            if not isinstance(rows[-1], dict):
                raise SvlError(f"calibration file '{path}', line {number + 1}: not an object with image and prompt")
    return rows


def _example(row: dict[str, Any], number: int, path: Path) -> Example:
    if isinstance(row.get("text"), str) and "prompt" not in row:
        return Example(number, row["text"], plain=True)
    if not isinstance(row.get("prompt"), str):
        raise SvlError(f"calibration file '{path}', row {number}: prompt is not text")
    image = row.get("image")
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    try:
        if isinstance(image, str):
            image = (path.parent / image).read_bytes()
        if image is not None:
            Image.open(io.BytesIO(image)).load()  # decode once now: a broken file must not end a long run later
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        raise SvlError(f"calibration file '{path}', row {number}: cannot read the image ({error})") from error
    answer = row.get("answer")
    return Example(number, row["prompt"], image, "" if answer is None else str(answer))
