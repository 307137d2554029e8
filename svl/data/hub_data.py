"""Calibration samples drawn from a data set of the hub, or a copy of it.

Data sets are streamed through `datasets`, of which nothing but the rows looked at is fetched; FORMATS says how their
rows become samples.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from svl.core import SvlError, one_of
from svl.core.errors import explained, reason_of
from svl.data.data_folder import find_data_files
from svl.data.samples import DESCRIBE, Samples, sample_of_row

BUFFER = 1000  # rows of a streamed data set among which the next one is drawn
CHARACTERS = 2000  # of running text in one sample, at least: about 500 tokens

Row = dict[str, Any]


@dataclass(frozen=True)
class HubSource:
    """What is drawn from a data set.

    Attributes:
        path: hub id, or folder with a copy.
        format: how rows become samples, a key of FORMATS.
        n: how many; a data set is too large for all.
        seed: of the order in which it is streamed, shuffled within a buffer of BUFFER rows.
        name: configuration of the data set.
        split: its part.
        revision: hub branch, tag or commit.
        prompt: what is asked where the data set has no questions.
        images: {"name": .., "key": ..}: the configuration that holds the images by `id`, if they are not in the rows,
            and the column that names them. The first `n` images are drawn, and the first question on each.

    Raises:
        SvlError: if there is no such format, or `n` is None.
    """

    path: str
    format: str
    n: int | None
    seed: int = 0
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    prompt: str | None = None
    images: dict[str, str] | None = None

    def __post_init__(self) -> None:
        one_of("calibration.format", self.format, list(FORMATS))
        if self.n is None:
            raise SvlError(f"calibration.samples is not set: say how many samples of '{self.path}' are wanted")


def draw_samples(source: HubSource) -> Samples:
    """The first samples of a data set, streamed in an order drawn by the seed.

    Raises:
        SvlError: if the data set, its split or a column is not there, or it has too few samples.
    """
    n = source.n or 0
    with explained(f"calibration.path: cannot read '{source.path}'"):
        rows: Iterable[Row]
        if source.format == "text":
            rows = _passages(source, n)
        elif source.images:
            images, questions = _stream(source, source.images["name"]), _stream(source, source.name, False)
            rows = _joined(images, questions, n, source.images["key"])
        else:
            rows = _stream(source, source.name)
        found = list(islice((row for row in (_converted(source, row) for row in rows) if row is not None), n))
    if len(found) < n:
        raise SvlError(
            f"data set '{source.path}' has {len(found)} samples in '{source.split}', but calibration.samples is {n}"
        )
    return Samples(source.path, tuple(sample_of_row(row, i, source.path, Path()) for i, row in enumerate(found)))


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


def _converted(source: HubSource, row: Row) -> Row | None:
    """A row as a sample; None for one that makes none."""
    try:
        return FORMATS[source.format](row, source.prompt or DESCRIBE)
    except KeyError as error:
        reads = f"which calibration.format={source.format} reads"
        raise SvlError(f"data set '{source.path}' has no column {error}, {reads}") from error
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        fits = f"does not fit calibration.format={source.format}: {reason_of(error)}"
        raise SvlError(f"a row of data set '{source.path}' {fits}") from error


def _passages(source: HubSource, n: int) -> list[Row]:
    """`n` passages of running text, drawn from the first 10 n."""
    lines = (row for row in (_converted(source, row) for row in _stream(source, source.name, False)) if row)
    texts = list(islice(_texts(lines), 10 * n))
    chosen = sorted(random.Random(source.seed).sample(range(len(texts)), min(n, len(texts))))
    return [{"text": texts[i]} for i in chosen]


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


def _text(row: Row, prompt: str) -> Row | None:
    return {"text": row["text"]}


# how a row becomes a sample (None: it does not): the columns that are read
FORMATS: dict[str, Callable[[Row, str], Row | None]] = {
    "prompt": _prompt,  # image, prompt, answer
    "question": _question,  # image, question, answer
    "choices": _choices,  # image, question, choices, answer or correct_choice_idx (a number), hint
    "caption": _caption,  # image, caption
    "messages": _messages,  # images, messages of role and content
    "turns": _turns,  # images, texts of user and assistant
    "text": _text,  # text alone: passages of several rows, see `_passages`
}
