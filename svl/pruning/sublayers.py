"""Attention or MLP removed of layers that stay (see `core.Plan.removed_attn`).

In memory, a block that is like those of most models is left out: it has no weights and computes nothing. Where that
could break something else, what the block writes is 0 instead: blocks of other kinds (experts, convolutions), attention
of protected layers, and of the first layer of each kind, whose cache tells a model how much it has read. No checkpoint
can say that a layer lacks a block, so exports always have zeros.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from svl.core.errors import SvlError
from svl.core.patch import Patch, Update
from svl.core.plan import Plan
from svl.models.layer_calls import first_argument
from svl.models.lvlm import Lvlm
from svl.models.placement import stored_tensor
from svl.pruning.folding import tensors_of_update

Sublayer = tuple[int, str]  # original layer, role


class NoAttention(nn.Module):
    """Writes nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(first_argument(args, kwargs)), None


class NoMlp(nn.Module):
    """Writes nothing."""

    def forward(self, state: Tensor) -> Tensor:
        return torch.zeros_like(state)


BLOCKS: dict[str, tuple[str, type[nn.Module]]] = {"attn": ("self_attn", NoAttention), "mlp": ("mlp", NoMlp)}


def blocks_left_out(lvlm: Lvlm, plan: Plan) -> list[Sublayer]:
    """The removed sub-layers of a plan whose block the model in memory does without."""
    text = lvlm.model.config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or [""] * plan.n_layers
    first = {kinds[i]: i for i in reversed(plan.kept)}
    needed = {*first.values(), *lvlm.anatomy.protected, *lvlm.anatomy.waived}
    found = []
    for layer, role in plan.sublayers:
        writer = lvlm.anatomy.writers[role][layer]
        is_common = writer.single and writer.module.partition(".")[0] == BLOCKS[role][0]
        if is_common and not (role == "attn" and layer in needed):
            found.append((layer, role))
    return found


def names_of_zeros(lvlm: Lvlm, plan: Plan) -> list[str]:
    """The removed sub-layers that are still there in memory, and write zeros, such as "0.attn"."""
    left_out = blocks_left_out(lvlm, plan)
    return [f"{layer}.{role}" for layer, role in plan.sublayers if (layer, role) not in left_out]


def with_zeros(patch: Patch, plan: Plan, left_out: list[Sublayer] | None = None) -> Patch:
    """A patch after which removed sub-layers write 0, but for those that are left out.

    Raises:
        SvlError: if the patch changes what a removed sub-layer writes: that would have no effect.
    """
    if lost := sorted(set(patch.updates) & set(plan.sublayers)):
        raise SvlError(f"the patch changes '{lost[0][1]}' of layer {lost[0][0]}, which the plan takes from that layer")
    zeros = {key: Update(scale=0.0) for key in plan.sublayers if key not in (left_out or ())}
    return replace(patch, updates={**patch.updates, **zeros}) if zeros else patch


def zeroed_tensors(lvlm: Lvlm, plan: Plan, layer: int) -> dict[str, Tensor]:
    """Zeros for all that removed sub-layers of a layer of the dense model write with, by names within the layer."""
    lost = [role for i, role in plan.sublayers if i == layer]
    names = [name for role in lost for name in tensors_of_update(lvlm.anatomy, layer, role, Update(scale=0.0))]
    return {name: torch.zeros_like(stored_tensor(lvlm.layers[layer], name)) for name in names}


def leave_out(kept: nn.ModuleList, layers: str, plan: Plan, left_out: list[Sublayer]) -> tuple[str, ...]:
    """Take the blocks out of the `kept` layers; gives the paths that they had in the pruned model, each with a dot."""
    paths = []
    for layer, role in left_out:
        name, kind = BLOCKS[role]
        number = plan.kept.index(layer)
        setattr(kept[number], name, kind())
        paths.append(f"{layers}.{number}.{name}.")
    return tuple(paths)


def copy_left_out(layers: nn.ModuleList, kept: nn.ModuleList, plan: Plan) -> None:
    """Leave out of the `kept` layers of a model that is made anew what the old one lacks already."""
    for new, old in enumerate(plan.kept):
        for name, module in layers[old].named_children():
            if isinstance(module, NoAttention | NoMlp):
                setattr(kept[new], name, type(module)())
