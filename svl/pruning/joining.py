"""Layers joined from parts of several (see `core.JoinedPart`): the same rows and columns in memory and on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from svl.core.errors import SvlError
from svl.core.patch import JoinedPart

# Projections by name -> which indices of a part choose their rows, or their columns.
ROWS = {"q_proj": "queries", "k_proj": "groups", "v_proj": "groups"}
ROWS |= dict.fromkeys(("gate_proj", "up_proj", "fc1"), "channels")
COLUMNS = {"o_proj": "queries", "out_proj": "queries", "down_proj": "channels", "fc2": "channels"}

Shapes = Mapping[str, tuple[int, ...]]


class Rule(NamedTuple):
    """How a tensor of a joined layer is made.

    Attributes:
        kind: queries, groups or channels, which of a part's indices choose on the axis; or norm or share, the
            coefficient by which the tensors of all parts are mixed.
        axis: along which the parts lie; None if they are mixed.
        size: rows or columns of one index.
    """

    kind: str
    axis: int | None = None
    size: int = 1


def join_rules(shapes: Shapes, parts: Sequence[JoinedPart], hidden: int) -> dict[str, Rule]:
    """How every tensor of a layer, named as within the layer, is put together; `hidden` is the layer's width d.

    A vector lies where its module does: beside the blocks it is a norm of the stream, [d]; within attention a norm of
    heads, or on the axis of the heads; within the MLP on that of the channels.

    Raises:
        SvlError: if it is not known how such a tensor is put together, or the parts do not fit its shape.
    """
    counts = {kind: sum(len(getattr(part, kind)) for part in parts) for kind in ("queries", "groups", "channels")}
    rules: dict[str, Rule] = {}
    inside: dict[str, dict[str, int]] = {}  # block -> kind -> rows or columns of one index
    for name, shape in shapes.items():
        block, module, leaf = _parts_of(name)
        is_column = module in COLUMNS
        if module in ROWS or (is_column and leaf == "weight"):
            kind, axis = (ROWS | COLUMNS)[module], int(is_column)
            if len(shape) <= axis or counts[kind] == 0 or shape[axis] % counts[kind]:
                raise _misfit(name, shape, kind, counts[kind])
            rules[name] = Rule(kind, axis, shape[axis] // counts[kind])
            inside.setdefault(block, {})[kind] = rules[name].size
    for name, shape in shapes.items():
        rule = rules.get(name) or _vector_rule(name, shape, hidden, inside, counts)
        if rule is None:
            raise SvlError(
                f"'{name}' is a tensor of which it is not known how layers are joined; choose another compensation"
            )
        rules[name] = rule
    for name, rule in rules.items():
        if rule.axis is not None:
            _check_indices(name, rule.kind, parts, counts[rule.kind])
    return rules


def _parts_of(name: str) -> tuple[str, str, str]:
    """Of a tensor's name within its layer: the block, the module within it, and what the tensor is of the module."""
    path, _, leaf = name.rpartition(".")
    block, _, module = path.rpartition(".")
    return block, module, leaf


def _vector_rule(
    name: str, shape: tuple[int, ...], hidden: int, inside: dict[str, dict[str, int]], counts: dict[str, int]
) -> Rule | None:
    """How a vector that is not beside the rows of a projection is put together; None if it is not known."""
    block, module, leaf = _parts_of(name)
    if len(shape) != 1 or leaf not in ("weight", "bias"):
        return None
    if module in COLUMNS or not block:
        is_output = module in COLUMNS
        return Rule("share" if is_output else "norm") if shape == (hidden,) else None
    sizes = inside.get(block, {})  # none for modules further within: norms of single heads, for one
    if "queries" in sizes and shape == (sizes["queries"],):
        return Rule("share")
    for kind in ("groups", "queries") if module.startswith("k") else ("queries", "groups", "channels"):
        if kind in sizes and shape == (counts[kind] * sizes[kind],):
            return Rule(kind, 0, sizes[kind])
    return None


def _check_indices(name: str, kind: str, parts: Sequence[JoinedPart], count: int) -> None:
    """Raise SvlError if a part asks for what a tensor does not have."""
    units = [getattr(part, kind) for part in parts]
    if any(bool((u < 0).any() or (u >= count).any()) for u in units):
        raise SvlError(f"the patch joins {kind} in '{name}' that it does not have: there are {count}")


def _misfit(name: str, shape: tuple[int, ...], kind: str, count: int) -> SvlError:
    """The error for parts that do not make a tensor of the layer's shape."""
    return SvlError(f"the patch joins {count} {kind} in '{name}', which does not fit its shape {shape}")


def join_tensors(name: str, tensors: Mapping[int, Tensor], parts: Sequence[JoinedPart], rule: Rule) -> Tensor:
    """The tensor `name` of a joined layer, from those of the layers that it has parts of; mixed in fp32.

    Raises:
        SvlError: if the tensors differ in shape.
    """
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    if len(shapes) != 1:
        raise SvlError(f"layers {sorted(tensors)} cannot be joined: their '{name}' have shapes {sorted(shapes)}")
    first = tensors[parts[0].layer]
    if rule.axis is not None:
        chosen = []
        for part in parts:
            units = getattr(part, rule.kind).long()[:, None] * rule.size + torch.arange(rule.size)
            chosen.append(tensors[part.layer].index_select(rule.axis, units.flatten().to(first.device)))
        return torch.cat(chosen, rule.axis)
    total = torch.zeros_like(first, dtype=torch.float32)
    for part in parts:
        total = total + getattr(part, rule.kind) * tensors[part.layer].detach().float()
    return total.to(first.dtype)
