"""Prompts and images for mPLUG-Owl2: "USER: <|image|>... ASSISTANT:", and square pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import AutoConfig, ProcessorMixin
from transformers.image_utils import SizeDict
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from svl.models.ports.mplug_owl2.tokenization_mplug_owl2 import IMAGE, MPLUGOwl2Tokenizer

TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['user', 'assistant'] -%}"
    "{{ raise_exception('mPLUG-Owl2 knows user and assistant only, not ' + message['role']) }}{%- endif -%}"
    "{{ message['role'].upper() + ': ' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{{ '" + IMAGE + "' if part['type'] == 'image' else part['text'] }}"
    "{%- endfor -%}{%- endif -%}{{ ' ' if message['role'] == 'user' else '</s>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)


class MPLUGOwl2ImageProcessor(CLIPImageProcessorPil):
    """CLIP's image processor after a step before: any form is stretched to a square as large as its longer side."""

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """An image as an array [3, side, side]."""
        array = super().process_image(image, *args, **kwargs)
        side = max(array.shape[-2:])
        return self.resize(array, SizeDict(height=side, width=side), resample=self.resample)


class MPLUGOwl2Processor(ProcessorMixin):
    """Image processor and tokenizer of mPLUG-Owl2.

    Args:
        image_processor: a `MPLUGOwl2ImageProcessor`, makes `pixel_values` [images, 3, size, size].
        tokenizer: a `MPLUGOwl2Tokenizer`.
        image_seq_length: visual tokens per image; each `<|image|>` in a prompt is an image and becomes as many.
        chat_template: default: the original's conversation.

    Raises:
        ValueError: when called, if prompts and images differ in number.
    """

    valid_kwargs = ["image_seq_length", "chat_template"]

    def __init__(
        self, image_processor: Any, tokenizer: Any, image_seq_length: int = 65, chat_template: str | None = None
    ):
        self.image_seq_length = image_seq_length
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or TEMPLATE)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """What one `<|image|>` becomes."""
        return IMAGE * self.image_seq_length

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Original checkpoints name LLaMA's tokenizer and CLIP's image processor, and do not count visual tokens."""
        given = processor_dict if processor_dict is not None else {}
        tokenizer = MPLUGOwl2Tokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if "image_processor" in given:
            return [MPLUGOwl2ImageProcessor.from_dict(given["image_processor"]), tokenizer]
        kwargs.pop("trust_remote_code", None)
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        given.setdefault("image_seq_length", config.image_seq_length)
        return [MPLUGOwl2ImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs), tokenizer]


__all__ = ["MPLUGOwl2ImageProcessor", "MPLUGOwl2Processor"]
