"""Rows of a batch in whatever a decoder layer is called with, and batches that repeat themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.utils import ModelOutput

from svl.core import SvlError

_ROWLESS = (type(None), bool, int, float, str, torch.dtype, torch.device)  # argument types that say nothing of rows


class Rows:
    """Some of the rows of a batch of `total`, in order; `index(device)` selects them."""

    def __init__(self, numbers: Sequence[int], total: int):
        self.numbers = tuple(numbers)
        self.all = self.numbers == tuple(range(total))
        self._on: dict[torch.device, Tensor] = {}

    def index(self, device: torch.device) -> Tensor:
        """Their numbers, as a tensor there."""
        if device not in self._on:
            self._on[device] = torch.tensor(self.numbers, device=device)
        return self._on[device]


class RowSelection:
    """Selects rows from arguments of decoder layers; what several layers are called with (masks) is selected once.

    Args:
        total: rows of the batch.
        name: of the model, for errors.
    """

    def __init__(self, total: int, name: str):
        self.total, self.name = total, name
        self._done: dict[tuple[int, int], tuple[Tensor, Rows, Tensor]] = {}

    def clear(self) -> None:
        """Forget what was selected: other arguments come."""
        self._done.clear()

    def of(self, name: str, value: Any, rows: Rows) -> Any:
        """`value`, given as the argument `name`, of `rows` alone.

        Raises:
            SvlError: if it is of a type whose rows are unknown.
        """
        if rows.all or isinstance(value, (*_ROWLESS, Cache)):
            return value
        if isinstance(value, Tensor):
            axis = row_axis(name, value, self.total)
            return value if axis is None else self._selected(value, axis, rows)
        if type(value) in (tuple, list):
            return type(value)(self.of(name, part, rows) for part in value)
        raise SvlError(f"layers of '{self.name}' are called with '{name}', a {type(value).__name__} of unknown rows")

    def _selected(self, value: Tensor, axis: int, rows: Rows) -> Tensor:
        key = (id(value), id(rows))
        if key not in self._done:  # with what the ids stand for, so that these stay theirs
            self._done[key] = (value, rows, value.index_select(axis, rows.index(value.device)))
        return self._done[key][2]


def row_axis(name: str, value: Tensor, total: int) -> int | None:
    """The axis of `value` that counts the `total` rows of a batch; None if it has none.

    Positions of several kinds (of time, height and width) come stacked along an axis before the rows.
    """
    if "position" in name:
        axis = value.ndim - (2 if "ids" in name else 3)  # [.., rows, tokens], [.., rows, tokens, width]
        if axis == 1 and value.shape[1] == total:
            return 1
        if axis < 0:
            return None
    return 0 if value.ndim > 1 and value.shape[0] == total else None


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` (a tensor, an output, a sequence or a dict of them) with every tensor changed, in a fixed order."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, ModelOutput):
        return type(value)(**{name: map_tensors(part, change) for name, part in value.items()})
    if type(value) is dict:
        return {name: map_tensors(part, change) for name, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map_tensors(part, change) for part in value)
    return value


def repeats(value: Tensor, times: int) -> bool:
    """Whether `value` is its beginning, so many times one after the other."""
    if value.ndim == 0 or not len(value) or len(value) % times:
        return False
    pieces = value.unflatten(0, (times, -1))
    return all(torch.equal(pieces[0], piece) for piece in pieces[1:])


def repeated(value: Tensor, times: int, axis: int = 0) -> Tensor:
    """`value` so many times one after the other."""
    return torch.cat([value] * times, axis)
