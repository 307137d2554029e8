"""Every attention and MLP switched off in turn, in one batch that grows on the way through the decoder layers.

A block is off where what it writes is 0. Where it would be the first to differ, a row joins the batch: the state of the
model with nothing more removed. So a candidate runs the layers from its own on, and every layer is called once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from svl.core import ROLES, SvlError
from svl.models.anatomy import Anatomy
from svl.models.layer_calls import first_output, hooked, with_first_output

Sublayer = tuple[int, str]  # layer, role


def block_number(sublayer: Sublayer) -> int:
    """A block's place among all blocks of the model: attention before MLP, layer after layer."""
    return 2 * sublayer[0] + ROLES.index(sublayer[1])


def sublayer_of(number: int) -> Sublayer:
    """The inverse of `block_number`."""
    return number // 2, ROLES[number % 2]


def block_name(number: int) -> str:
    """What messages call a block."""
    layer, role = sublayer_of(number)
    return f"{role} of layer {layer}"


def sweep_sublayers(
    run: Callable[[int, Tensor], Tensor],
    layers: nn.ModuleList,
    anatomy: Anatomy,
    state: Tensor,
    start: int,
    removed: Collection[int],
    candidates: Collection[int],
) -> tuple[tuple[int, ...], Tensor]:
    """States that leave the last layer: with `removed` off, then with one of `candidates` off besides, ascending.

    Args:
        run: what a layer makes of a batch of states.
        layers: all decoder layers.
        anatomy: where they write.
        state: [1, T, d], enters layer `start`.
        start: first layer that is run.
        removed: numbers of blocks (`block_number`).
        candidates: numbers of blocks, none of them removed.

    Returns:
        The candidates, and states [1 + C, T, d].

    Raises:
        SvlError: if a layer lacks one of the two blocks.
    """
    if missing := [role for role in ROLES if role not in anatomy.writers]:
        raise SvlError(f"not every layer of this model has a block '{missing[0]}', so they cannot be tried one by one")
    states = state
    rows: tuple[int, ...] = ()
    for i in range(start, len(layers)):
        mine = [block_number((i, role)) for role in ROLES]
        joining = tuple(number for number in mine if number in candidates)
        states, rows = torch.cat([states, states[:1].expand(len(joining), -1, -1)]), (*rows, *joining)
        off = {
            anatomy.writers[sublayer_of(number)[1]][i].module: (
                slice(None) if number in removed else slice(1 + rows.index(number), 2 + rows.index(number))
            )
            for number in mine
            if number in removed or number in joining
        }
        with _writing_nothing(layers[i], off, len(states)):
            states = run(i, states)
    return rows, states


@contextmanager
def _writing_nothing(layer: nn.Module, off: dict[str, slice], batch: int) -> Iterator[None]:
    """Within the block, modules of `layer` write 0 to the given rows of the batch."""

    def zero(rows: slice) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            written = first_output(output).clone()
            written.view(batch, -1)[rows] = 0  # some blocks of experts write rows of tokens
            return with_first_output(output, written)

        return hook

    with hooked(layer.get_submodule(name).register_forward_hook(zero(rows)) for name, rows in off.items()):
        yield
