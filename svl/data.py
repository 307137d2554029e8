"""Calibration samples: from one's own files, or drawn from a data set of the hub (or a copy of it).

One's own: parquet or JSON lines with `image` and `prompt` (one user turn), and an optional `answer`; or `text` alone,
running text as it is; or a folder of images. Data sets are streamed through `datasets`, of which nothing but the rows
looked at is fetched; FORMATS says how their rows become samples.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from svl.core import SvlError, did_you_mean, one_of

SUFFIXES = (".parquet", ".jsonl", ".json")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DESCRIBE = "Describe this image."  # what is asked about images without a question
BUFFER = 1000  # rows of a streamed data set among which the next one is drawn
CHARACTERS = 2000  # of running text in one sample, at least: about 500 tokens


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


def read_samples(path: str | Path, n: int | None = None, seed: int = 0, prompt: str | None = None) -> Examples:
    """Read `n` samples (all if None) from a file, in its order; if it has more, a random subset by `seed`.

    `image` may hold encoded bytes, `{"bytes": ..}` as `datasets` writes it, or a path relative to the file. Of a
    folder, the images in it and below (by name, all asked `prompt`), or what its `metadata.jsonl` says with
    `file_name` and `prompt`.

    Raises:
        SvlError: if the file is missing, of another type, empty, without `prompt` (or `image`) column, or an image
            cannot be read (the message names the row).
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path, rows = _folder(path, prompt or DESCRIBE)
    elif not path.is_file():
        raise SvlError(f"calibration.path: there is no file '{path}'")
    elif path.suffix not in SUFFIXES:
        raise SvlError(f"calibration.path: '{path.name}' is not one of {', '.join(SUFFIXES)}")
    else:
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


def _folder(path: Path, prompt: str) -> tuple[Path, list[dict[str, Any]]]:
    """What names relative to it mean, and the rows of a folder of images."""
    if (file := path / "metadata.jsonl").is_file():
        rows = [{"image": row.pop("file_name", None), **row} for row in _json_lines(file)]
        return file, [{"prompt": prompt, **row} for row in rows]
    files = sorted(p.relative_to(path) for p in path.rglob("*") if p.suffix.lower() in PICTURES)
    if not files:
        raise SvlError(f"calibration.path: there is no image and no metadata.jsonl in the folder '{path}'")
    return path / "images", [{"image": str(file), "prompt": prompt} for file in files]


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


# ------------------------------------------------------------------------------------------------- data sets

Row = dict[str, Any]


def draw(
    path: str,
    *,
    format: str,
    n: int | None,
    seed: int = 0,
    name: str | None = None,
    split: str = "train",
    revision: str | None = None,
    prompt: str | None = None,
    images: dict[str, str] | None = None,
) -> Examples:
    """The first `n` samples of a data set that is streamed in an order drawn by `seed`.

    Args:
        path: hub id, or folder with a copy.
        format: how rows become samples, a key of FORMATS.
        n: how many; a data set is too large for all.
        seed: of the order, within a buffer of BUFFER rows.
        name: configuration of the data set.
        split: its part.
        revision: hub branch, tag or commit.
        prompt: what is asked where the data set has no questions.
        images: {"name": .., "key": ..}: the configuration that holds the images by `id`, if they are not in the rows,
            and the column that names them. The first `n` images are drawn, and the first question on each.

    Raises:
        SvlError: if the data set, its split or a column is not there, or it has fewer than `n` samples.
    """
    one_of("calibration.format", format, list(FORMATS))
    if n is None:
        raise SvlError(f"calibration.samples is not set: say how many samples of '{path}' are wanted")

    def stream(configuration: str | None, shuffled: bool = True) -> Any:
        return _stream(path, configuration, split, revision, seed if shuffled else None)

    if format == "text":
        texts = [text for text, _ in zip(_texts(stream(name, shuffled=False)), range(10 * n), strict=False)]
        chosen = sorted(random.Random(seed).sample(range(len(texts)), min(n, len(texts))))
        found = [{"text": texts[i]} for i in chosen]
    else:
        rows = (
            _joined(stream(images["name"]), stream(name, shuffled=False), n, images["key"]) if images else stream(name)
        )
        try:
            samples = (sample for row in rows if (sample := FORMATS[format](row, prompt or DESCRIBE)) is not None)
            found = [sample for sample, _ in zip(samples, range(n), strict=False)]
        except KeyError as error:
            raise SvlError(
                f"data set '{path}' has no column {error}, which calibration.format={format} reads"
            ) from error
    if len(found) < n:
        raise SvlError(f"data set '{path}' has {len(found)} samples in '{split}', but calibration.samples is {n}")
    return Examples(path, tuple(_example(row, i, Path(path)) for i, row in enumerate(found)))


def _stream(path: str, name: str | None, split: str, revision: str | None, seed: int | None) -> Any:
    """Rows of a data set with images as they are stored; shuffled if there is a seed."""
    import datasets

    folder = Path(path).expanduser()
    place = str(folder.absolute()) if folder.is_dir() else path
    try:
        rows: Any = datasets.load_dataset(place, name, split=split, revision=revision, streaming=True)
        for column, feature in (rows.features or {}).items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
            elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
                rows = rows.cast_column(column, datasets.List(datasets.Image(decode=False)))
        return rows if seed is None else rows.shuffle(seed=seed, buffer_size=BUFFER)
    except (OSError, ValueError) as error:  # no such data set, configuration or split; no network
        raise SvlError(f"calibration.path: cannot read '{path}': {str(error).splitlines()[0]}") from error


def _joined(images: Iterable[Row], questions: Iterable[Row], n: int, key: str) -> Iterator[Row]:
    """The first question on each of the first `n` images, in the order of the images."""
    pictures = {row["id"]: row["image"] for row, _ in zip(images, range(n), strict=False)}
    asked: dict[Any, Row] = {}
    for row in questions:
        if row[key] in pictures and row[key] not in asked:
            asked[row[key]] = row
            if len(asked) == len(pictures):
                break
    return ({**asked[i], "image": picture} for i, picture in pictures.items() if i in asked)


def _texts(rows: Iterable[Row]) -> Iterator[str]:
    """Running text of at least CHARACTERS, from lines: paragraphs whole, headings and empty lines left out."""
    text = ""
    for row in rows:
        line = row["text"].strip()
        if line and not line.startswith("="):
            text = f"{text}\n{line}" if text else line
            if len(text) >= CHARACTERS:
                yield text
                text = ""


def _question(row: Row, prompt: str) -> Row | None:
    return {"image": row["image"], "prompt": row["question"], "answer": row["answer"]}


def _choices(row: Row, prompt: str) -> Row | None:
    """A question with lettered choices, asked as the benchmarks do; rows without an image are left out."""
    if row["image"] is None:
        return None
    right = row["answer"] if "answer" in row else row["correct_choice_idx"]
    hint = f"Context: {row['hint']}\n" if row.get("hint") else ""
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCDEFGHIJ", row["choices"], strict=False))
    ask = "Answer with the option's letter from the given choices directly."
    return {
        "image": row["image"],
        "prompt": f"{hint}{row['question']}\n{choices}\n{ask}",
        "answer": "ABCDEFGHIJ"[right],
    }


def _caption(row: Row, prompt: str) -> Row | None:
    return {"image": row["image"], "prompt": prompt, "answer": row["caption"]}


def _messages(row: Row, prompt: str) -> Row | None:
    """The first turn of a conversation on one image."""
    asked, said, *_ = (
        "".join(part["text"] or "" for part in message["content"] if part["type"] == "text").strip()
        for message in row["messages"]
    )
    return {"image": row["images"][0], "prompt": asked, "answer": said} if len(row["images"]) == 1 else None


def _turns(row: Row, prompt: str) -> Row | None:
    """As `_messages`, of turns with `user` and `assistant`."""
    if len(row["images"]) != 1:
        return None
    return {"image": row["images"][0], "prompt": row["texts"][0]["user"], "answer": row["texts"][0]["assistant"]}


def _prompt(row: Row, prompt: str) -> Row | None:
    return {"image": row["image"], "prompt": row["prompt"], "answer": row.get("answer")}


# how a row becomes a sample (None: it does not): the columns that are read
FORMATS: dict[str, Callable[[Row, str], Row | None]] = {
    "prompt": _prompt,  # image, prompt, answer
    "question": _question,  # image, question, answer
    "choices": _choices,  # image, question, choices, answer or correct_choice_idx (a number), hint
    "caption": _caption,  # image, caption
    "messages": _messages,  # images, messages of role and content
    "turns": _turns,  # images, texts of user and assistant
    "text": _prompt,  # text alone: not by row, see `_texts`
}


def save(examples: Examples, path: Path) -> None:
    """Write samples as a parquet file that `read_samples` reads."""
    import pyarrow
    import pyarrow.parquet

    if examples.items[0].plain:
        columns: dict[str, list[Any]] = {"text": [e.prompt for e in examples.items]}
    else:
        columns = {
            "image": [e.image_bytes for e in examples.items],
            "prompt": [e.prompt for e in examples.items],
            "answer": [e.answer for e in examples.items],
        }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
