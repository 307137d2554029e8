"""Samples as inputs of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL.Image import Image
from torch import Tensor

from svl.core import SvlError
from svl.core.errors import explained
from svl.data.samples import Sample
from svl.models.lvlm import Lvlm

WAY_OUT = "; leave the sample out, change its picture, or name the placeholder of images with model.image_token"


@contextmanager
def explained_samples(batch: Sequence[Sample]) -> Iterator[None]:
    """Within the block, whatever the model's own code raises becomes one line that names the samples it ran on."""
    label = batch[0].label
    if len(batch) > 1:
        rows = ", ".join(str(sample.row) for sample in batch[1:])
        label = f"{label}, or one of the rows {rows} (calibration.batch_size=1 tells which),"
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
    texts = [s.prompt if s.plain else _prompt(lvlm, s) for s in batch]
    return lvlm.encode(texts, [_images(lvlm, s) for s in batch])


def _images(lvlm: Lvlm, sample: Sample) -> list[Image]:
    """What of a sample the model is shown; a text-only model sees nothing."""
    return [sample.image] if lvlm.takes_images and sample.image_bytes is not None else []


def _prompt(lvlm: Lvlm, sample: Sample, answer: str | None = None) -> str:
    has_image = lvlm.takes_images and sample.image_bytes is not None
    try:
        return lvlm.prompt(sample.prompt, has_image, answer)
    except SvlError as error:
        raise SvlError(f"{sample.label}: {error}") from error


def encode_answer(lvlm: Lvlm, sample: Sample) -> tuple[dict[str, Tensor], Tensor]:
    """Model inputs of one sample with its answer (batch of one, no padding), and which tokens [T] are the answer.

    The answer is what the chat template makes of it, end of turn included; of plain text, every token is one.

    Raises:
        SvlError: if template or processor refuse the sample, or the answer adds no token.
    """
    with explained_samples([sample]):
        if sample.plain:
            inputs = lvlm.encode([sample.prompt])
            return inputs, torch.ones_like(inputs["input_ids"][0], dtype=torch.bool)
        images = [_images(lvlm, sample)]
        asked = lvlm.encode([_prompt(lvlm, sample)], images)["input_ids"][0]
        inputs = lvlm.encode([_prompt(lvlm, sample, sample.answer).rstrip("\n")], images)
    tokens = inputs["input_ids"][0]
    same = int((tokens[: len(asked)] == asked[: len(tokens)]).long().cumprod(0).sum())
    if same == len(tokens):
        raise SvlError(f"{sample.label}: the answer '{sample.answer}' adds no token to the prompt")
    return inputs, torch.arange(len(tokens), device=tokens.device) >= same
