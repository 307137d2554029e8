"""A model with its processor and its anatomy: what every stage works on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from svl.core.errors import SvlError, explained
from svl.data.pictures import open_picture
from svl.models import devices
from svl.models.anatomy import Anatomy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
Batch = TypeVar("Batch")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Lvlm:
    """A model, its processor (a tokenizer for text-only models) and its anatomy.

    Attributes:
        model: in evaluation mode, its parameters without gradients.
        processor: makes model inputs of text and images; of text alone if it is a tokenizer.
        anatomy: where the model's decoder layers are.
        name: what messages, plans and reports call the model.
    """

    model: PreTrainedModel
    processor: ProcessorMixin | PreTrainedTokenizerBase
    anatomy: Anatomy
    name: str = "model"

    def require_in_memory(self, what: str) -> None:
        """Raise SvlError if decoder layers are not in memory (`model.offload`), so that `what` is impossible."""
        if any(p.is_meta for p in self.layers.parameters()):
            raise SvlError(f"{what} needs all of '{self.name}' in memory: set model.offload=false, or do without it")

    def map(
        self, work: Callable[[Lvlm, Batch], Result], batches: Sequence[Batch], show: Progress, what: str = ""
    ) -> Iterator[Result]:
        """What `work(lvlm, batch)` gives for every batch, in order; `show` displays progress.

        All work on calibration data goes through here, as a model that does not fit in memory orders it otherwise.
        """
        for batch in show(batches, what, len(batches)):
            yield work(self, batch)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return self.anatomy.layers_of(self.model)

    @property
    def device(self) -> torch.device:
        """Where the inputs belong."""
        return self.model.device

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer."""
        tokenizer: Any = getattr(self.processor, "tokenizer", self.processor)
        return tokenizer

    @property
    def takes_images(self) -> bool:
        """Whether the model takes images."""
        return self.anatomy.image_token_id is not None

    @property
    def takes_videos(self) -> bool:
        """Whether the model's processor takes videos."""
        return self.takes_images and getattr(self.processor, "video_processor", None) is not None

    def is_visual(self, ids: Tensor) -> Tensor:
        """Which of the tokens `ids`, of any shape, stand for pictures or videos; boolean, of the same shape."""
        visual = torch.zeros_like(ids, dtype=torch.bool)
        for placeholder in (self.anatomy.image_token_id, self.anatomy.video_token_id):
            if placeholder is not None:
                visual |= ids == placeholder
        return visual

    def render(self, conversation: list[dict[str, Any]]) -> str:
        """A conversation in the model's own chat template, or as plain text where it has none.

        After a user's turn the text is ready for the answer.

        Args:
            conversation: turns {"role", "content"}; the content is a text, or a list of parts, {"type": "image"},
                {"type": "video"} or {"type": "text", "text"}.

        Raises:
            SvlError: if there is an image and no template says where it goes, or the template fails.
        """
        template = getattr(self.processor, "chat_template", None)
        if template is None and any(_has_image(turn["content"]) for turn in conversation):
            raise SvlError(f"model '{self.name}' has no chat template, so an image cannot be placed in its prompt")
        if template is None or not self.takes_images:  # templates of text models expect strings
            conversation = [{**turn, "content": _joined_text(turn["content"])} for turn in conversation]
        if template is None:
            return "\n".join(turn["content"] for turn in conversation)
        asks = conversation[-1]["role"] != "assistant"
        with explained(f"the chat template of '{self.name}' fails"):
            return str(self.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=asks))

    def prompt(self, text: str, image: bool, answer: str | None = None) -> str:
        """One user turn of text, after an image if there is one, and its answer, as `render` gives it.

        Raises:
            SvlError: if the text holds the model's own mark of an image.
        """
        self.check_text(text)
        parts = [{"type": "image"}] if image else []
        turns = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return self.render(turns)

    def check_text(self, text: str) -> None:
        """Raise SvlError if a text holds the model's own mark of an image, which only the template may write."""
        placeholder = self.anatomy.image_token_id
        if placeholder is None:
            return
        with explained(f"the tokenizer of '{self.name}' has no image placeholder {placeholder}"):
            mark = self.tokenizer.convert_ids_to_tokens(placeholder)
        if isinstance(mark, str) and mark in text:
            raise SvlError(f"the prompt '{text[:60]}' contains {mark}; leave it out: the template places the image")

    def encode(
        self, texts: list[str], images: Sequence[Any] | None = None, videos: Sequence[Any] | None = None
    ) -> dict[str, Tensor]:
        """Model inputs for prompts and their images, in the order in which the prompts have placeholders.

        An image is an open picture, encoded bytes or a path; they may come in one list per prompt. A video is a list
        of frames, which are images.

        Padded on the left, on the model's device; numbers that are no ids are in the model's dtype.

        Raises:
            SvlError: if an image cannot be read.
        """
        tokenizer = self.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        bos = tokenizer.bos_token
        template_wrote_bos = bool(bos) and all(text.startswith(bos) for text in texts)
        inputs = self.processor(
            text=texts,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=not template_wrote_bos,
            **({"images": _opened(images)} if images else {}),
            **({"videos": _opened(videos)} if videos else {}),
        )
        dtype = self.model.dtype
        return {k: v.to(self.device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}

    def device_facts(self, batch_size: int) -> dict[str, Any]:
        """What a speed depends on besides the model: type and name of the device, and the batch size."""
        return devices.device_facts(self.device, batch_size)

    def parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(p.numel() for p in self.model.parameters())


def _has_image(content: str | list[dict[str, Any]]) -> bool:
    return not isinstance(content, str) and any(part["type"] == "image" for part in content)


def _joined_text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(p["text"] for p in content if p["type"] == "text")


def _opened(images: Sequence[Any]) -> list[Any]:
    return [_opened(image) if isinstance(image, list | tuple) else open_picture(image) for image in images]
