"""Calibration samples: pictures and a conversation, or running text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.core.errors import SvlError
from svl.data import pictures

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"  # where a picture or video stands in a text
_MARKS = re.compile(rf"\s*({IMAGE_MARK}|{VIDEO_MARK})\s*")

Turn = dict[str, Any]  # {"role", "content"}, content as parts: {"type": "image" | "video"} or {"type": "text", "text"}


@dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
        row: its number, from 0, where it was read.
        prompt: the user's last turn. Of `plain` running text, the text: no chat template is put around it, and every
            token is an answer to those before it.
        images: encoded pictures, in the order in which the turns show them. They stand where the texts have
            IMAGE_MARK, or before the first user turn if no text has one.
        answer: what is expected; may be empty.
        plain: whether this is running text.
        source: where it was read.
        earlier: the turns before `prompt`, as (role, text); roles are system, user and assistant.
        frames: encoded pictures of a video, in their order. It stands where a text has VIDEO_MARK, or first.
    """

    row: int
    prompt: str
    images: tuple[bytes, ...] = ()
    answer: str = ""
    plain: bool = False
    source: str = ""
    earlier: tuple[tuple[str, str], ...] = ()
    frames: tuple[bytes, ...] = ()

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"row {self.row} of '{self.source}'" if self.source else f"calibration row {self.row}"

    @property
    def pictures(self) -> list[Image]:
        """The decoded RGB pictures, in order."""
        return [pictures.open_picture(image, f"a picture of {self.label}") for image in self.images]

    @property
    def video(self) -> list[Image]:
        """The decoded RGB frames of its video; none if it has no video."""
        return [pictures.open_picture(frame, f"the video of {self.label}") for frame in self.frames]

    def conversation(self, pictured: bool = True, answered: bool = False) -> list[Turn]:
        """The turns, with parts where pictures and video stand.

        Args:
            pictured: whether the model is shown them; otherwise the texts stand alone.
            answered: whether the answer is the last turn.
        """
        texts = [*self.earlier, ("user", self.prompt)]
        leading = [{"type": "image"}] * len(self.images) + [{"type": "video"}] * bool(self.frames)
        if any(_MARKS.search(text) for _, text in texts) or not pictured:
            leading = []
        turns = []
        for role, text in texts:
            parts = _parts(text, pictured) if self.images or self.frames else [{"type": "text", "text": text}]
            if role == "user":
                parts, leading = [*leading, *parts], []
            turns.append({"role": role, "content": parts})
        if answered:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": self.answer}]})
        return turns


def _parts(text: str, pictured: bool) -> list[dict[str, str]]:
    """A text as parts, split at its marks."""
    parts = []
    for piece in _MARKS.split(text):
        if piece in (IMAGE_MARK, VIDEO_MARK):
            parts.append({"type": piece.strip("<>")})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return [part for part in parts if pictured or part["type"] == "text"] or [{"type": "text", "text": ""}]


@dataclass(frozen=True)
class Samples:
    """A calibration set; `source` names it in messages."""

    source: str
    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def batches(self, size: int, equal_images: bool = False) -> list[tuple[Sample, ...]]:
        """The samples in their order, at most `size` at a time; the videos of one batch have equally many frames.

        Processors of several families stack the videos of a batch. With `equal_images`, samples of one batch have
        equally many of them, too.
        """
        batches: list[list[Sample]] = []
        frames: set[int] = set()  # of the videos in the last batch
        for sample in self:
            shown = {len(sample.frames)} - {0}
            other = equal_images and batches and len(batches[-1][0].images) != len(sample.images)
            if not batches or len(batches[-1]) == size or len(frames | shown) > 1 or other:
                batches.append([])
                frames = set()
            batches[-1].append(sample)
            frames |= shown
        return [tuple(batch) for batch in batches]

    def check_answered(self, what: str) -> None:
        """Raise SvlError, which says that `what` needs them, unless all samples have answers, or are running text.

        A blank answer is none.
        """
        if missing := [s for s in self if not s.plain and not s.answer.strip()]:
            raise SvlError(f"{what} needs answers, but {len(missing)} samples have none, {missing[0].label} for one")

    @cached_property
    def fingerprint(self) -> str:
        """Hash of every row number, text before the answer, picture and video frame, in order: 16 hex digits."""
        return _hash(_asked(sample) for sample in self)

    @cached_property
    def answers(self) -> str:
        """Hash of every answer, in order: 16 hex digits."""
        return _hash((s.answer.encode(), str(s.plain).encode()) for s in self)


def _asked(sample: Sample) -> Iterator[bytes]:
    yield f"{sample.row} {len(sample.images)} {len(sample.frames)} {len(sample.earlier)}".encode()
    yield from sample.images
    yield from sample.frames
    for role, text in sample.earlier:
        yield role.encode()
        yield text.encode()
    yield sample.prompt.encode()


def _hash(records: Iterable[Iterable[bytes]]) -> str:
    digest = hashlib.sha256()
    for part in (part for record in records for part in record):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:16]


def write_samples(samples: Samples, path: Path) -> None:
    """Write samples as a parquet file that `sample_files.read_samples` reads."""
    import pyarrow.parquet

    if samples.samples[0].plain:
        columns: dict[str, list[Any]] = {"text": [s.prompt for s in samples]}
    else:
        columns = {
            "images": [list(s.images) for s in samples],
            "prompt": [s.prompt for s in samples],
            "answer": [s.answer for s in samples],
        }
        if any(s.earlier for s in samples):
            columns["earlier"] = [[{"role": role, "content": text} for role, text in s.earlier] for s in samples]
        if any(s.frames for s in samples):
            columns["video"] = [list(s.frames) for s in samples]
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
