"""A layer of a key-value cache that makes room ahead: one more token is written, not all of them copied.

transformers' own copies all keys and values at every token, which for many rows takes longer than reading the weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 32  # tokens, for which it makes room at once


class GrowingLayer(DynamicLayer):
    """Keys and values [rows, heads, tokens, width] of all tokens so far, at the beginning of tensors with room."""

    keys: Tensor
    values: Tensor
    _key_room: Tensor | None = None
    _value_room: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add those of new tokens; all of them."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = key_states, value_states
        else:
            self._key_room, self.keys = _extended(self._key_room, self.keys, key_states)
            self._value_room, self.values = _extended(self._value_room, self.values, value_states)
        return self.keys, self.values


def _extended(room: Tensor | None, held: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """`held` and `more` one after the other, and what they lie in: `room`, if that starts with `held` and is enough."""
    length, whole = held.shape[-2], held.shape[-2] + more.shape[-2]
    beginning = room is not None and room.data_ptr() == held.data_ptr() and len(room) == len(held)
    if room is None or not beginning or room.shape[-2] < whole:
        room = held.new_empty(*held.shape[:-2], whole + ROOM, held.shape[-1])
        room[..., :length, :] = held
    room[..., length:whole, :] = more
    return room, room[..., :whole, :]
