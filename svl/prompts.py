"""How a conversation is written out for a model, where that is not left to the checkpoint's own chat template.

`model.prompt` names the style; it holds for calibration and for the evaluation of the dense and of pruned models alike,
is part of every key, and shows in each score as the whole text of its first prompt. Exported checkpoints keep their own
template.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from svl.core import SvlError, did_you_mean, one_of
from svl.loading import Lvlm

_CONTENT = (
    "{%- macro said(message) -%}{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}{{ 'IMAGE' }}{%- else -%}"
    "{{ part['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
STYLES = {
    "chat": "",  # the checkpoint's own
    # LLaVA-1.5's conversation, system prompt included (the template of llava-hf checkpoints leaves it out)
    "vicuna_v1": _CONTENT.replace("IMAGE", "IMAGE\\n")
    + "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions.{{ ' ' }}{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' + said(message) + ' ' }}"
    "{%- else -%}{{ 'ASSISTANT: ' + said(message) + '</s>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}",
    # PaliGemma, which has no chat template: a task word and a language before the question
    "paligemma": _CONTENT.replace("{{ part['text'] }}", "{{ 'answer en ' + part['text'] }}")
    + "{%- for message in messages -%}{{ said(message) }}{%- endfor -%}",
    # the image and the text, nothing else: for base models
    "plain": _CONTENT.replace("IMAGE", "IMAGE\\n") + "{%- for message in messages -%}{{ said(message) }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\\n' }}{%- endif -%}",
}


def styled(lvlm: Lvlm, style: str, image_processor: Mapping[str, Any] | None = None) -> Lvlm:
    """The same model, whose conversations are written in `style` and whose images go through changed settings.

    Args:
        lvlm: the model; it is left as it is.
        style: a key of STYLES.
        image_processor: settings of the checkpoint's image processor, such as its `size`, to use instead of its own.

    Raises:
        SvlError: if there is no such style, or the image processor has no such setting.
    """
    one_of("model.prompt", style, list(STYLES))
    processor = copy.copy(lvlm.processor)
    if style != "chat":
        processor.chat_template = STYLES[style].replace("IMAGE", getattr(processor, "image_token", None) or "<image>")
    if image_processor:
        images: Any = getattr(processor, "image_processor", None)
        known = images.to_dict() if images is not None else {}
        for name in image_processor:
            if name not in known:
                raise SvlError(f"model.image_processor has no setting '{name}'{did_you_mean(name, known)}")
        processor.image_processor = type(images).from_dict({**known, **image_processor})
    return dataclasses.replace(lvlm, processor=processor)
