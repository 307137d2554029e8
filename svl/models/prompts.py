"""How a conversation is written out for a model, where that is not left to the checkpoint's own chat template.

`model.prompt` names the style; it holds for calibration and for the evaluation of the dense and of pruned models alike,
is part of every key, and shows in each score as the whole text of its first prompt. Exported checkpoints keep their own
template.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svl.core.errors import one_of
from svl.models.lvlm import Lvlm
from svl.models.processors import puts_picture_first, with_settings

TEMPLATES = Path(__file__).parent / "prompt_templates"
STYLES = ("chat", *sorted(file.stem for file in TEMPLATES.glob("*.jinja")))  # chat: the checkpoint's own


def style_template(style: str, image_token: str = "<image>") -> str | None:
    """The chat template of a style in STYLES, with the model's mark of an image (empty: none); None for "chat"."""
    if style == "chat":
        return None
    text = (TEMPLATES / f"{style}.jinja").read_text().rstrip("\n")
    return f"{{%- set image_token = {json.dumps(image_token)} -%}}{text}"


def with_prompt_style(lvlm: Lvlm, style: str, image_processor: Mapping[str, Any] | None = None) -> Lvlm:
    """The same model, whose conversations are written in `style` and whose images go through changed settings.

    Args:
        lvlm: the model; it is left as it is.
        style: one of STYLES.
        image_processor: settings of the checkpoint's image processor, such as its `size`, to use instead of its own;
            `image_processor_type` is another class of transformers.

    Raises:
        SvlError: if there is no such style, or the image processor has no such setting, or refuses its value.
    """
    one_of("model.prompt", style, STYLES)
    processor = copy.copy(lvlm.processor)
    if style != "chat":
        mark = "" if puts_picture_first(processor) else getattr(processor, "image_token", None) or "<image>"
        processor.chat_template = style_template(style, mark)
    if image_processor:
        images: Any = getattr(processor, "image_processor", None)
        processor.image_processor = with_settings(images, image_processor)
    return dataclasses.replace(lvlm, processor=processor)
