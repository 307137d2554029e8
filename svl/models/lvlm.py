"""A model with its processor and its anatomy: what every stage works on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from svl.core.errors import SvlError, explained
from svl.data.pictures import open_picture
from svl.models import devices, placement
from svl.models.anatomy import Anatomy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]  # of items, what is done with them, how many they are
Batch = TypeVar("Batch")
Result = TypeVar("Result")

SECONDS_PER_FRAME = 0.5  # of a video that comes as frames: what Qwen's own tools take a list of frames to be


def no_progress(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    """No progress display."""
    return items


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
        if not placement.is_spread(self.model) and any(p.is_meta for p in self.layers.parameters()):
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
        """Where the inputs belong, and where logits come out."""
        return placement.input_device(self.model)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where the model computes: several devices, the inputs' first, of one that is spread over them."""
        return placement.devices_of(self.model)

    @property
    def heads(self) -> tuple[int, int]:
        """How many query heads, and how many key-value heads, an attention of the decoder has."""
        text = self.model.config.get_text_config(decoder=True)
        queries = int(text.num_attention_heads)
        return queries, int(getattr(text, "num_key_value_heads", None) or queries)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer."""
        tokenizer: Any = getattr(self.processor, "tokenizer", self.processor)
        return tokenizer

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """What ends the model's answers, as text: the tokenizer's own first, if generation stops at it; maybe none."""
        tokenizer: Any = self.tokenizer
        stops = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ids, own = [stops] if isinstance(stops, int) else list(stops or ()), tokenizer.eos_token_id
        ids = sorted(ids, key=lambda stop: stop != own) if own in ids else [*ids, own]
        return tuple(token for stop in ids if stop is not None and (token := tokenizer.convert_ids_to_tokens(stop)))

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Tokens that stand for no text, as the tokenizer writes them."""
        known = self.tokenizer.added_tokens_decoder.values()
        return tuple(token.content for token in known if token.special)

    @property
    def takes_images(self) -> bool:
        """Whether the model takes images."""
        return self.anatomy.image_token_id is not None

    @property
    def takes_videos(self) -> bool:
        """Whether the model's processor takes videos."""
        return self.takes_images and getattr(self.processor, "video_processor", None) is not None

    @property
    def needs_equal_images(self) -> bool:
        """Whether the prompts of one batch must show equally many images.

        Where cross-attention reads them, a prompt with fewer would be shown padding in the place of the others.
        """
        return bool(getattr(self.model.config.get_text_config(), "cross_attention_layers", None))

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
            raise SvlError(
                f"model '{self.name}' has no chat template, so an image cannot be placed in its prompt; model.prompt "
                "names another way to write it"
            )
        if template is None or not self.takes_images:  # templates of text models expect strings
            conversation = [{**turn, "content": _joined_text(turn["content"])} for turn in conversation]
        if template is None:
            return "\n".join(turn["content"] for turn in conversation)
        asks = conversation[-1]["role"] != "assistant"
        with explained(f"the chat template of '{self.name}' fails"):
            return str(self.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=asks))

    def prompt(self, text: str, images: int, answer: str | None = None, video: bool = False) -> str:
        """One user turn of text, after what it is about, and its answer, as `render` gives it.

        Args:
            text: of the turn.
            images: how many come before the text.
            answer: the assistant's turn after it.
            video: whether a video comes before the text, after the images.

        Raises:
            SvlError: if the text holds the model's own mark of an image or a video.
        """
        self.check_text(text)
        parts = [{"type": "image"}] * int(images) + [{"type": "video"}] * video
        turns = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        if answer is not None:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return self.render(turns)

    def check_text(self, text: str) -> None:
        """Raise SvlError if a text holds a mark of an image or a video, the model's or the processor's own.

        Only the template writes them.
        """
        marks: list[Any] = [getattr(self.processor, name, None) for name in ("image_token", "video_token")]
        for placeholder in self.anatomy.visual_token_ids:
            with explained(f"the tokenizer of '{self.name}' has no image placeholder {placeholder}"):
                marks.append(self.tokenizer.convert_ids_to_tokens(placeholder))
        for mark in marks:
            if isinstance(mark, str) and mark in text:
                raise SvlError(f"the prompt '{text[:60]}' contains {mark}; leave it out: the template places the image")

    def encode(
        self,
        texts: list[str],
        images: Sequence[Sequence[Any]] | None = None,
        videos: Sequence[Sequence[Any] | None] | None = None,
    ) -> dict[str, Tensor]:
        """Model inputs for prompts and what they show.

        Padded on the left, on the model's device; numbers that are no ids are in the model's dtype.

        Args:
            texts: prompts, as `render` or `prompt` gives them.
            images: for every prompt, its images in the order of its placeholders; an empty list for none. Each is an
                open picture, encoded bytes or a path.
            videos: for every prompt, the frames of its video, taken to be SECONDS_PER_FRAME apart; None for none.

        Raises:
            SvlError: if there are not as many lists as prompts, an image cannot be read, or the model takes no videos.
        """
        tokenizer = self.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        inputs = self.processor(
            **self._text_arguments(texts),
            **self._image_arguments(texts, images or ()),
            **self._video_arguments(texts, images or (), videos or ()),
        )
        self._drop_second_bos(inputs, texts)
        dtype, known = self.model.dtype, _forward_arguments(type(self.model))
        return {
            name: devices.moved(value.to(dtype if value.is_floating_point() else value.dtype), self.device)
            for name, value in inputs.items()
            if known is None or name in known
        }

    def _text_arguments(self, texts: list[str]) -> dict[str, Any]:
        """What the processor is given for texts."""
        how = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        return {"text": texts, **how, "add_special_tokens": not all(self._have_bos(texts))}

    def _have_bos(self, texts: list[str]) -> list[bool]:
        """Which texts begin with the token that a tokenizer would put there: templates write it."""
        bos = self.tokenizer.bos_token
        return [bool(bos) and text.startswith(bos) for text in texts]

    def _drop_second_bos(self, inputs: Any, texts: list[str]) -> None:
        """Make the first of two padding, in rows whose text has one, beside rows that were given theirs."""
        have = self._have_bos(texts)
        if all(have) or not any(have):
            return
        ids, present = inputs["input_ids"], inputs["attention_mask"]
        for row in (row for row, has in enumerate(have) if has):
            first = int(present[row].argmax())
            if int(ids[row, first]) == int(ids[row, first + 1]) == self.tokenizer.bos_token_id:
                ids[row, first], present[row, first] = self.tokenizer.pad_token_id, 0

    def _image_arguments(self, texts: list[str], images: Sequence[Any]) -> dict[str, Any]:
        """What the processor is given for images: a list per prompt, which every processor takes, or nothing."""
        if images and (len(images) != len(texts) or not all(isinstance(given, list | tuple) for given in images)):
            raise SvlError(f"images must come as one list for each of the {len(texts)} prompts, empty for none")
        from svl.models.processors import puts_picture_first

        counts = [len(given) for given in images]
        if puts_picture_first(self.processor) and set(counts) - {1}:
            raise SvlError(f"'{self.name}' takes one image before every prompt; these have {counts}")
        if self.needs_equal_images and len(set(counts)) > 1:
            raise SvlError(
                f"'{self.name}' reads images by cross-attention, so prompts of one batch must show equally many; these "
                f"have {counts}"
            )
        return {"images": [list(map(open_picture, given)) for given in images]} if any(images) else {}

    def _video_arguments(self, texts: list[str], images: Sequence[Any], videos: Sequence[Any]) -> dict[str, Any]:
        """What the processor is given for videos: their frames, all of them, and when they are, or nothing."""
        if videos and len(videos) != len(texts):
            raise SvlError(f"videos must come as one list of frames, or None, for each of the {len(texts)} prompts")
        if not any(videos):
            return {}
        if getattr(self.processor, "video_processor", None) is None:
            raise SvlError(f"'{self.name}' takes no videos: its processor has no part for them")
        from svl.models.processors import reads_images_or_videos

        if any(images) and reads_images_or_videos(self.processor):
            raise SvlError(f"'{self.name}' takes no images beside videos in one batch; give it one by one")
        shown = [list(map(open_picture, frames)) for frames in videos if frames]
        times = [
            {"total_num_frames": len(frames), "fps": 1 / SECONDS_PER_FRAME, "frames_indices": list(range(len(frames)))}
            for frames in shown
        ]
        return {"videos": shown, "video_metadata": times, "do_sample_frames": False}

    def with_answers(
        self, inputs: dict[str, Tensor], lengths: Sequence[int], asked: list[str] | None = None
    ) -> dict[str, Tensor]:
        """The same inputs, of which the last tokens are an answer: what predicts one sees none that comes after it.

        Two kinds of models must be told: those that read prompts both ways, by `token_type_ids` of 1 for what is no
        prompt, and those whose Q-Former reads the prompt, too.

        Args:
            inputs: as `encode` gives them, padded on the left.
            lengths: how many tokens of each row are its answer.
            asked: the prompts without their answers; None for running text.
        """
        from svl.models.processors import reads_prompt_both_ways

        inputs = dict(inputs)
        if "token_type_ids" in inputs and reads_prompt_both_ways(self.processor):
            types = inputs["token_type_ids"] = inputs["token_type_ids"].clone()
            for row, length in zip(types, lengths, strict=True):
                row[len(row) - length :] = 1
        if asked and (read := [name for name in inputs if name.startswith("qformer_")]):
            prompts = self.processor(**self._text_arguments(asked))
            inputs |= {name: devices.moved(prompts[name], self.device) for name in read}
        return inputs

    def is_visual(self, input_ids: Tensor) -> Tensor:
        """Which of the ids, of any shape, are placeholders that features of an image or a video replace."""
        placeholders = torch.tensor(self.anatomy.visual_token_ids, dtype=input_ids.dtype, device=input_ids.device)
        return torch.isin(input_ids, placeholders)

    def device_facts(self, batch_size: int) -> dict[str, Any]:
        """What a speed depends on besides the model: type and name of the device, and the batch size."""
        facts = devices.device_facts(self.device, batch_size)
        return {**facts, "spread": placement.places_of(self.model)} if placement.is_spread(self.model) else facts

    def parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        return sum(p.numel() for p in self.model.parameters())


def _has_image(content: str | list[dict[str, Any]]) -> bool:
    return not isinstance(content, str) and any(part["type"] == "image" for part in content)


def _joined_text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(p["text"] for p in content if p["type"] == "text")


def _forward_arguments(model_class: Any) -> frozenset[str] | None:
    """Names of what a model computes logits from, as its `forward` has them; None if it takes anything.

    Processors return more: targets, counts that only they need.
    """
    named = inspect.signature(model_class.forward).parameters.values()
    names = frozenset(p.name for p in named if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return names - {"labels"} if "input_ids" in names else None
