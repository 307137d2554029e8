"""Prompts and images for Qwen-VL: ChatML with "Picture 1: <img>...</img>", and square pictures.

The original puts the path of an image between `<img>` and `</img>`, as bytes padded to 256 tokens that the model
overwrites. Here, there are 256 `<imgpad>` in that place, and the image comes as pixels.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import AutoConfig, ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from svl.models.ports.qwen_vl.tokenization_qwen_vl import QWenTokenizer

SYSTEM = "You are a helpful assistant."
TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\\n" + SYSTEM + "<|im_end|>' }}{%- endif -%}"
    "{%- for message in messages -%}{%- if not loop.first or message['role'] != 'system' -%}{{ '\\n' }}{%- endif -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- set seen = namespace(images=0) -%}{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}"
    "{%- set seen.images = seen.images + 1 -%}"
    "{{ 'Picture ' + seen.images|string + ': <img><imgpad></img>\\n' }}"
    "{%- else -%}{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<|im_end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\\n<|im_start|>assistant\\n' }}{%- endif -%}"
)
BARE = re.compile(r"(?:<img>)?(<imgpad>)(?:</img>)?")


class QwenVLProcessor(ProcessorMixin):
    """Image processor and tokenizer of Qwen-VL.

    Args:
        image_processor: makes `pixel_values` [images, 3, size, size]; any form is squeezed into the square.
        tokenizer: a `QWenTokenizer`.
        image_seq_length: visual tokens per image; each `<imgpad>` in a prompt, within `<img>` and `</img>` or bare,
            stands for one image and becomes as many, within both.
        chat_template: default: the original's conversation.

    Raises:
        ValueError: when called, if prompts and images differ in number.
    """

    valid_kwargs = ["image_seq_length", "chat_template"]

    def __init__(
        self, image_processor: Any, tokenizer: Any, image_seq_length: int = 256, chat_template: str | None = None
    ):
        self.image_seq_length = image_seq_length
        self.image_token = "<imgpad>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or TEMPLATE)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """What one `<imgpad>` becomes."""
        return self.image_token * self.image_seq_length

    def prepare_inputs_layout(  # type: ignore[override]
        self, images: Any = None, text: Any = None, **kwargs: Any
    ) -> Any:
        """As the parent's, with `<img>` and `</img>` around placeholders that lack them."""
        images, text, *rest = super().prepare_inputs_layout(images=images, text=text, **kwargs)
        if text is not None:
            text = [BARE.sub(r"<img>\1</img>", t) if isinstance(t, str) else t for t in text]
        return images, text, *rest

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Original checkpoints have a vocabulary only; what else there is to know is in their config."""
        given = processor_dict if processor_dict is not None else {}
        tokenizer = QWenTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if "image_processor" in given:
            return [CLIPImageProcessorPil.from_dict(given["image_processor"]), tokenizer]
        kwargs.pop("trust_remote_code", None)
        visual = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs).visual
        given.setdefault("image_seq_length", visual.n_queries)
        size = {"height": visual.image_size, "width": visual.image_size}
        return [CLIPImageProcessorPil(size=size, do_center_crop=False, default_to_square=True), tokenizer]


__all__ = ["QwenVLProcessor"]
