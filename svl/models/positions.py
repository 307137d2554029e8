"""Positions of tokens, where a model looks them up in a table of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import Tensor, nn

from svl.models.lvlm import Lvlm


def looked_up_positions(lvlm: Lvlm, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`position_ids` [B, T] that count tokens and no padding, for models like GPT-2; nothing for all others.

    These look positions up by index, so that without them padding on the left would shift a prompt. Rotary attention
    sees differences of positions alone, and other models make positions of the mask. (transformers does this, too, but
    only in `generate`.)

    Args:
        lvlm: whatever model.
        inputs: as `Lvlm.encode` gives them, padded on the left.
    """
    if "position_ids" in inputs or "attention_mask" not in inputs or not _looks_up_positions(lvlm):
        return {}
    return {"position_ids": (inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)}


def _looks_up_positions(lvlm: Lvlm) -> bool:
    """Whether a table with a row for every position stands beside the decoder layers, and `forward` takes positions."""
    if "position_ids" not in inspect.signature(lvlm.model.forward).parameters:
        return False
    decoder = lvlm.model.get_submodule(lvlm.anatomy.layers.rpartition(".")[0])
    longest = getattr(lvlm.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    words = lvlm.model.get_input_embeddings()
    tables = (child for child in decoder.children() if isinstance(child, nn.Embedding) and child is not words)
    return any(table.num_embeddings == longest for table in tables)
