"""Maps at cuts in memory: where a run of layers was, the residual stream h becomes W h (see `core.Patch.maps`).

A map is a module of the kept layer behind the run, and is applied to what enters that layer; of the last run, where
nothing is behind it, it belongs to the last kept layer, and is applied to what leaves it. It is thus counted, moved and
copied with its layer, whose parameter it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from svl.core.errors import SvlError
from svl.core.patch import Patch
from svl.core.plan import Plan
from svl.models.layer_calls import first_argument, first_output, with_first_argument, with_first_output
from svl.models.lvlm import Lvlm
from svl.models.placement import input_device

ENTERING, LEAVING = "map_of_entering", "map_of_leaving"  # names of a layer's maps


class CutMap(nn.Module):
    """h -> W h in fp32, in the dtype of h; W [d, d] is read in later."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, width, device="meta"), requires_grad=False)

    def forward(self, state: Tensor) -> Tensor:
        with torch.autocast(self.weight.device.type, enabled=False):  # that of recovery in bfloat16
            return F.linear(state.to(self.weight.device, torch.float32), self.weight).to(state.dtype)


def check_no_maps(lvlm: Lvlm, plan: Plan) -> None:
    """Raise SvlError if layers are to be removed of a model that has maps, which were fitted to its present cuts."""
    if plan.removed and any(isinstance(module, CutMap) for module in lvlm.layers.modules()):
        raise SvlError(f"'{lvlm.name}' has maps at its cuts: prune the dense model, by all layers that shall go")


def copy_maps(layers: nn.ModuleList, same: nn.ModuleList) -> None:
    """Give the layers of a model that is made anew the maps of the old one, without values, if it has any."""
    for old, new in zip(layers, same, strict=False):
        for name, module in old.named_children():
            if isinstance(module, CutMap):
                _add_map(new, name, len(module.weight))


def add_maps(lvlm: Lvlm, kept: nn.ModuleList, plan: Plan, patch: Patch) -> dict[str, Tensor]:
    """Give the `kept` layers the maps of `patch`, without values; the values, by names in the pruned model."""
    values = {}
    for start, stop in plan.runs:
        if start not in patch.maps:
            continue
        is_last = stop == plan.n_layers
        name = LEAVING if is_last else ENTERING
        number = len(kept) - 1 if is_last else plan.kept.index(stop)
        _add_map(kept[number], name, lvlm.anatomy.hidden_size)
        device = next(lvlm.layers[plan.kept[number]].parameters()).device
        device = input_device(lvlm.model) if device.type == "meta" else device  # of a layer that is read when needed
        values[f"{lvlm.anatomy.layers}.{number}.{name}.weight"] = patch.maps[start].to(device, torch.float32)
    return values


def _add_map(layer: nn.Module, name: str, width: int) -> None:
    layer.add_module(name, CutMap(width))
    if name == ENTERING:
        layer.register_forward_pre_hook(_map_entering, with_kwargs=True)
    else:
        layer.register_forward_hook(_map_leaving)


def _map_entering(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return with_first_argument(args, kwargs, layer.get_submodule(ENTERING)(first_argument(args, kwargs)))


def _map_leaving(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return with_first_output(output, layer.get_submodule(LEAVING)(first_output(output)))
