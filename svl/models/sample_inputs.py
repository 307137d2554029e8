"""Samples as inputs of a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from svl.core import SvlError
from svl.core.errors import explained
from svl.data.samples import Sample
from svl.models.lvlm import Lvlm

WAY_OUT = "; leave the sample out, change its picture, or name the placeholder of images with model.image_token"


@contextmanager
def explained_samples(batch: Sequence[Sample], setting: str = "calibration.batch_size") -> Iterator[None]:
    """Within the block, whatever the model's own code raises becomes one line that names the samples it ran on.

    `setting` is the one by which they are as many.
    """
    label = batch[0].label
    if len(batch) > 1:
        rows = ", ".join(str(sample.row) for sample in batch[1:])
        label = f"{label}, or one of the rows {rows} ({setting}=1 tells which),"
    with explained(f"{label} does not go through the model", WAY_OUT):
        yield


def encode_samples(lvlm: Lvlm, batch: Sequence[Sample]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Model inputs, which positions [B, T] hold tokens of the sample, and which hold visual ones.

    Raises:
        SvlError: if template or processor refuse a sample.
    """
    with explained_samples(batch):
        try:
            inputs = _encode(lvlm, batch)
        except Exception:
            for sample in batch:  # where one alone fails, too, its error names it
                with explained_samples([sample]):
                    _encode(lvlm, [sample])
            raise
    return inputs, inputs["attention_mask"].bool(), lvlm.is_visual(inputs["input_ids"])


def _encode(lvlm: Lvlm, batch: Sequence[Sample]) -> dict[str, Tensor]:
    return encode_texts(lvlm, [sample_text(lvlm, sample) for sample in batch], batch)


def sample_text(lvlm: Lvlm, sample: Sample, answered: bool = False) -> str:
    """A sample in the model's chat template, ready for its answer or with it; running text as it is.

    A text-only model is shown the texts alone.

    Raises:
        SvlError: if the template fails, the sample has a video that the model cannot take, or a text holds the model's
            own mark of an image.
    """
    if sample.frames and lvlm.takes_images and not lvlm.takes_videos:
        raise SvlError(f"{sample.label} has a video, but '{lvlm.name}' takes none; give its frames as images")
    turns = [] if sample.plain else sample.conversation(pictured=lvlm.takes_images, answered=answered)
    texts = [part.get("text", "") for turn in turns for part in turn["content"]]
    try:
        for text in texts or [sample.prompt]:
            lvlm.check_text(text)
        return sample.prompt if sample.plain else lvlm.render(turns)
    except SvlError as error:
        raise SvlError(f"{sample.label}: {error}") from error


def answered_text(lvlm: Lvlm, sample: Sample) -> str:
    """A sample in the model's chat template with its answer and the end of it; running text as it is.

    It ends in the first token behind the answer at which the model's generation stops, or which is special otherwise.
    Templates without one write something else there, to part it from the next turn, in whose place an end token stands.

    Raises:
        SvlError: as `sample_text` does.
    """
    text, said = sample_text(lvlm, sample, answered=not sample.plain), sample.answer.strip()
    if sample.plain or not said:
        return text if sample.plain else text.rstrip()
    begin = len(os.path.commonprefix([text, sample_text(lvlm, sample)]))  # noqa: RUF071 (these are no paths)
    at = text.find(said, begin)
    behind = begin if at < 0 else at + len(said)
    end = _end_of_first(lvlm.end_tokens, text, behind) or _end_of_first(lvlm.special_tokens, text, behind)
    if end is not None:
        return text[:end]
    return (text if at < 0 else text[:behind]).rstrip() + "".join(lvlm.end_tokens[:1])


def _end_of_first(marks: Sequence[str], text: str, begin: int) -> int | None:
    """Where the first of these marks that is in a text behind `begin` ends; None if none is there."""
    places = [place + len(mark) for mark in marks if (place := text.find(mark, begin)) >= 0]
    return min(places, default=None)


def encode_texts(lvlm: Lvlm, texts: list[str], batch: Sequence[Sample]) -> dict[str, Tensor]:
    """Model inputs of samples whose texts are written already."""
    if not lvlm.takes_images:
        return lvlm.encode(texts)
    images = [sample.pictures for sample in batch]
    return lvlm.encode(texts, images, [sample.video for sample in batch])


def encode_answer(lvlm: Lvlm, sample: Sample) -> tuple[dict[str, Tensor], Tensor]:
    """Model inputs of one sample with its answer (batch of one, no padding), and which tokens [T] are the answer.

    The answer is what `answered_text` makes of it, end token included; of plain text, every token is one. No token of
    it is seen by one before it, whatever the model does with prompts.

    Raises:
        SvlError: if template or processor refuse the sample, or the answer adds no token.
    """
    with explained_samples([sample]):
        prompt = sample_text(lvlm, sample)
        asked = encode_texts(lvlm, [prompt], [sample])
        if sample.plain:
            answer = torch.ones_like(asked["input_ids"][0], dtype=torch.bool)
            return lvlm.with_answers(asked, [len(answer)]), answer
        inputs = encode_texts(lvlm, [answered_text(lvlm, sample)], [sample])
    tokens = inputs["input_ids"][0]
    before = asked["input_ids"][0]
    same = int((tokens[: len(before)] == before[: len(tokens)]).long().cumprod(0).sum())
    if same == len(tokens):
        raise SvlError(f"{sample.label}: the answer '{sample.answer}' adds no token to the prompt")
    answer = torch.arange(len(tokens), device=tokens.device) >= same
    return lvlm.with_answers(inputs, [len(tokens) - same], [prompt]), answer
