"""Layers joined from parts of several (see `core.JoinedPart`): the same rows and columns in memory and on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from svl.core.errors import SvlError
from svl.core.patch import JoinedPart

# Projections by name -> which indices of a part choose their rows, or their columns.
ROWS = {"q_proj": "queries", "k_proj": "groups", "v_proj": "groups"}
ROWS |= dict.fromkeys(("gate_proj", "up_proj", "fc1"), "channels")
COLUMNS = {"o_proj": "queries", "out_proj": "queries", "down_proj": "channels", "fc2": "channels"}
HEAD_NORMS = ("q_norm", "k_norm")  # mixed as biases are, by share


def join_axis(name: str, shape: tuple[int, ...], parts: Sequence[JoinedPart]) -> tuple[int, list[Tensor]] | None:
    """The axis along which a layer's tensor `name` is put together, and each part's indices on it; None: it is mixed.

    Raises:
        SvlError: if it is not known how such a tensor is put together, or the parts do not fit its shape.
    """
    module, _, leaf = name.rpartition(".")
    module = module.rpartition(".")[2]
    is_column = module in COLUMNS
    if module in ROWS or (is_column and leaf == "weight"):
        axis, kind = int(is_column), (ROWS | COLUMNS)[module]
        units = [getattr(part, kind) for part in parts]
        count = sum(map(len, units))
        if count == 0 or shape[axis] % count or any(bool((u < 0).any() or (u >= count).any()) for u in units):
            raise SvlError(f"the patch joins {count} {kind} in '{name}', which does not fit its shape {shape}")
        size = shape[axis] // count
        return axis, [(u.long()[:, None] * size + torch.arange(size)).flatten() for u in units]
    if len(shape) > 1 or leaf not in ("weight", "bias"):
        raise SvlError(
            f"'{name}' is a tensor of which it is not known how layers are joined; choose another compensation"
        )
    return None


def join_tensors(name: str, tensors: Mapping[int, Tensor], parts: Sequence[JoinedPart]) -> Tensor:
    """The tensor `name` of a joined layer, from those of the layers that it has parts of; mixed in fp32.

    Raises:
        SvlError: as `join_axis` does, and if the tensors differ in shape.
    """
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    if len(shapes) != 1:
        raise SvlError(f"layers {sorted(tensors)} cannot be joined: their '{name}' have shapes {sorted(shapes)}")
    first = tensors[parts[0].layer]
    chosen = join_axis(name, tuple(first.shape), parts)
    if chosen:
        axis, indices = chosen
        pairs = zip(parts, indices, strict=True)
        return torch.cat([tensors[p.layer].index_select(axis, i.to(first.device)) for p, i in pairs], axis)
    module = name.rpartition(".")[0].rpartition(".")[2]
    total = torch.zeros_like(first, dtype=torch.float32)
    for part in parts:
        factor = part.share if module in COLUMNS or module in HEAD_NORMS else part.norm
        total = total + factor * tensors[part.layer].detach().float()
    return total.to(first.dtype)
