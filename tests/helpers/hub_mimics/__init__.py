"""Tiny random checkpoints whose files have the names and keys of the real ones on the hub.

`MIMICS` has one for every file in conf/model that names a hub id: config, preprocessor, processor, generation and
tokenizer files with what the real ones say (sizes apart), tensors under the names, in the types and shards of the
real ones. Vocabularies are invented and small.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from helpers.hub_mimics import llava, others, ports, qwen

MIMICS: dict[str, Callable[[Path], None]] = {
    "gemma3_4b": others.gemma3,
    "internvl3_8b": qwen.internvl3,
    "llava_15_13b": llava.llava_15_13b,
    "llava_15_7b": llava.llava_15,
    "llava_next_7b": llava.llava_next,
    "llava_onevision_7b": llava.llava_onevision,
    "mplug_owl2": ports.mplug_owl2,
    "paligemma2_3b": others.paligemma2,
    "qwen2_5_vl_7b": qwen.qwen2_5_vl,
    "qwen2_vl_7b": qwen.qwen2_vl,
    "qwen3_vl_8b": qwen.qwen3_vl,
    "qwen_vl_chat": ports.qwen_vl_chat,
    "smolvlm2_2b": others.smolvlm2,
}

# The family of each, as docs/families.md names it; of a port that is tested in a file of its own, none.
FAMILIES: dict[str, str | None] = {
    "gemma3_4b": "gemma3",
    "internvl3_8b": "internvl",
    "llava_15_13b": "llava",
    "llava_15_7b": "llava",
    "llava_next_7b": "llava_next",
    "llava_onevision_7b": "llava_onevision",
    "paligemma2_3b": "paligemma2",
    "qwen2_5_vl_7b": "qwen2_5_vl",
    "qwen2_vl_7b": "qwen2_vl",
    "qwen3_vl_8b": "qwen3_vl",
    "qwen_vl_chat": None,
    "smolvlm2_2b": "smolvlm",
}
