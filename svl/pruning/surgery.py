"""The one surgeon: builds the model that a plan (and a patch) describe.

The pruned model is a new one, built from a pruned config and sharing every tensor that did not change. The dense
model is never touched, so undoing is forgetting: nothing to restore, no hook left behind. Building from the config
(instead of cutting the live list of layers) keeps all that a model derives from its depth right: cache slots, masks
per layer type, rotary settings. Only what a patch changes takes new memory. Maps at cuts are the one thing that is
added to a model, as modules of its layers (see `pruning.cut_maps`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from svl.core.errors import explained
from svl.core.patch import Patch
from svl.core.plan import Plan
from svl.models.anatomy import Anatomy
from svl.models.lvlm import Lvlm
from svl.models.placement import device_map, is_offloaded, place_like, stored_tensor
from svl.models.transformers_internals import keep_stored_layout, model_on_meta
from svl.pruning import cut_maps, sublayers
from svl.pruning.folding import (
    blend_tensors,
    check_patch_for_model,
    fold_update,
    parameter_shapes,
    projections,
    tensors_of_update,
)
from svl.pruning.joining import join_rules, join_tensors
from svl.pruning.pruned_config import pruned_config
from svl.pruning.selfcheck import check_layer_settings
from svl.pruning.trained import change_tensor, check_trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tensors beside the layers that hold one slice per layer -> the axis that the slices lie along.
PACKED = {"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0}


def apply(lvlm: Lvlm, plan: Plan, patch: Patch | None = None) -> Lvlm:
    """The pruned model. Shares all unchanged tensors with `lvlm`, which stays as it is.

    Raises:
        SvlError: if the plan is for another depth or removes protected layers, the patch does not fit, or kept layers
            would compute something else than before.
    """
    lvlm.require_in_memory("running the pruned model")
    anatomy, dense = lvlm.anatomy, lvlm.model
    anatomy.check_plan(plan, lvlm.name)
    left_out = sublayers.blocks_left_out(lvlm, plan)
    patch = sublayers.with_zeros(patch or Patch(), plan, left_out)
    check_patch_for_model(patch, plan, anatomy, lvlm.layers)
    check_trained(patch.trained, plan, anatomy, dense)
    cut_maps.check_no_maps(lvlm, plan)
    pruned = model_on_meta(dense, pruned_config(dense.config, plan))
    cut_maps.copy_maps(lvlm.layers, anatomy.layers_of(pruned))
    sublayers.copy_left_out(lvlm.layers, anatomy.layers_of(pruned), plan)
    if not set(plan.removed) & set(anatomy.waived):
        check_layer_settings(lvlm.layers, anatomy.layers_of(pruned), plan, lvlm.name)
    tensors = dense.state_dict()
    packed = [name for name in tensors if plan.removed and packed_axis(name, anatomy.layers) is not None]
    tensors |= {name: stored_tensor(dense, name) for name in packed}
    state = kept_tensors(tensors, anatomy, plan) | patched_tensors(lvlm, plan, patch)
    state |= cut_maps.add_maps(lvlm, anatomy.layers_of(pruned), plan, patch)
    absent = sublayers.leave_out(anatomy.layers_of(pruned), anatomy.layers, plan, left_out)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(absent)}
    parts = new_names([*(name for name, _ in dense.named_modules()), *device_map(dense)], anatomy, plan)
    parts = {old: new for old, new in parts.items() if not new.startswith(absent)}
    state = place_like(dense, pruned, parts, state)
    with explained(f"'{lvlm.name}' cannot do without layers {list(plan.removed)}"):  # a layer may have another shape
        missing, unexpected = pruned.load_state_dict(state, strict=False, assign=True)
    copy_ties(dense, pruned, anatomy, plan)
    copy_computed_buffers(dense, pruned, anatomy, plan)
    named = (*pruned.named_parameters(), *pruned.named_buffers())
    empty = [n for n, t in named if t.is_meta and not is_offloaded(pruned, n)]
    if empty or unexpected:
        raise RuntimeError(f"surgery on {type(dense).__name__} left {empty} empty, {unexpected} unused ({missing=})")
    pruned.generation_config = copy.deepcopy(dense.generation_config)
    keep_stored_layout(dense, pruned)
    return replace(lvlm, model=pruned.requires_grad_(False).eval(), anatomy=pruned_anatomy(anatomy, plan))


def skeleton(lvlm: Lvlm, plan: Plan) -> Lvlm:
    """The model that is left after a plan, without weights: modules, names and shapes, on the meta device.

    Those of `lvlm` need not be there. Sub-layers that the plan takes are still there.

    Raises:
        SvlError: if the plan is for another depth or removes protected layers.
    """
    lvlm.anatomy.check_plan(plan, lvlm.name)
    pruned = model_on_meta(lvlm.model, pruned_config(lvlm.model.config, plan))
    copy_ties(lvlm.model, pruned, lvlm.anatomy, plan)
    return replace(lvlm, model=pruned, anatomy=pruned_anatomy(lvlm.anatomy, plan))


def kept_tensors(tensors: dict[str, Tensor], anatomy: Anatomy, plan: Plan) -> dict[str, Tensor]:
    """`tensors` without what belongs to removed layers, the others under their new layer number."""
    result = {}
    for old, new in new_names(tensors, anatomy, plan).items():
        axis = packed_axis(old, anatomy.layers)
        if plan.removed and axis is not None:
            slices = tensors[old].chunk(plan.n_layers, axis)
            result[new] = torch.cat([slices[i] for i in plan.kept], axis)
        else:
            result[new] = tensors[old]
    return result


def new_names(names: Iterable[str], anatomy: Anatomy, plan: Plan) -> dict[str, str]:
    """Names of tensors and modules of the dense model -> their names in the pruned one, which may lack some."""
    prefix, new_index = f"{anatomy.layers}.", {str(old): new for new, old in enumerate(plan.kept)}
    result = {}
    for name in names:
        number, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            result[name] = name
        elif number in new_index:
            result[name] = f"{prefix}{new_index[number]}.{rest}".rstrip(".")
    return result


def packed_axis(name: str, layers: str) -> int | None:
    """The axis along which a tensor beside the `layers` holds one slice per layer; None for all other tensors."""
    return PACKED.get(name.removeprefix(f"{layers.rpartition('.')[0]}."))


def patched_tensors(lvlm: Lvlm, plan: Plan, patch: Patch) -> dict[str, Tensor]:
    """What `patch` changes, by names in the pruned model."""
    anatomy = lvlm.anatomy
    new_index = {old: new for new, old in enumerate(plan.kept)}
    changed: dict[str, Tensor] = {}

    def dense(layer: int, rest: str) -> Tensor:
        return stored_tensor(lvlm.layers[layer], rest)

    for layer, terms in patch.blends.items():
        for rest in projections(lvlm.layers[layer]):
            home = dense(layer, rest).device
            sources = {k: dense(k, rest).to(home) for k in terms}
            changed[f"{anatomy.layers}.{new_index[layer]}.{rest}"] = blend_tensors(sources, terms)
    for layer, parts in patch.joins.items():
        for rest, rule in join_rules(parameter_shapes(lvlm.layers[layer]), parts, anatomy.hidden_size).items():
            home = dense(layer, rest).device
            sources = {part.layer: dense(part.layer, rest).to(home) for part in parts}
            changed[f"{anatomy.layers}.{new_index[layer]}.{rest}"] = join_tensors(rest, sources, parts, rule)
    for (layer, role), update in patch.updates.items():
        for rest, flipped in tensors_of_update(anatomy, layer, role, update).items():
            name = f"{anatomy.layers}.{new_index[layer]}.{rest}"
            before = changed[name] if name in changed else dense(layer, rest)
            changed[name] = fold_update(before, update, flipped)
    for old, name in new_names(patch.trained, anatomy, plan).items():
        before = changed[name] if name in changed else stored_tensor(lvlm.model, old)
        changed[name] = change_tensor(before, patch.trained[old])
    return changed


def copy_ties(dense: PreTrainedModel, pruned: PreTrainedModel, anatomy: Anatomy, plan: Plan) -> None:
    """Let parameters of `pruned` be one and the same where those of `dense` are, whatever the config says."""
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for old, new in new_names(parameters, anatomy, plan).items():
        owner = first.setdefault(id(parameters[old]), new)
        if owner != new:
            set_tensor(pruned, new, pruned.get_parameter(owner))


def copy_computed_buffers(dense: PreTrainedModel, pruned: PreTrainedModel, anatomy: Anatomy, plan: Plan) -> None:
    """Give `pruned` the buffers of `dense` that are in no state dict, such as rotary tables."""
    buffers = kept_tensors(dict(dense.named_buffers()), anatomy, plan)
    for name, buffer in list(pruned.named_buffers()):
        if buffer.is_meta and name in buffers:
            set_tensor(pruned, name, buffers[name])


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter or buffer of this name."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, tensor)


def pruned_anatomy(anatomy: Anatomy, plan: Plan) -> Anatomy:
    """The anatomy of the model that is left after `plan`."""
    new_index = {old: new for new, old in enumerate(plan.kept)}
    return replace(
        anatomy,
        n_layers=len(plan.kept),
        writers={role: tuple(writers[i] for i in plan.kept) for role, writers in anatomy.writers.items()},
        protected={new_index[i]: why for i, why in anatomy.protected.items()},
        waived=tuple(new_index[i] for i in anatomy.waived if i in new_index),
    )
