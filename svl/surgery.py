"""The one surgeon: builds the model that a plan (and a patch) describe.

The pruned model is a new one, built from a pruned config and sharing every tensor that did not change. The dense
model is never touched, so undoing is forgetting: nothing to restore, no hook left behind. Building from the config
(instead of cutting the live list of layers) keeps all that a model derives from its depth right: cache slots, masks
per layer type, rotary settings. Only what a patch changes takes new memory.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from svl.core import Patch, Plan, SvlError, Update
from svl.models import Lvlm

DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "layers")  # config fields that count layers
PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types", "intermediate_size", "activation_sparsity_pattern")
INDEX_SETS = ("cross_attention_layers", "moe_layers", "mlp_only_layers", "full_attn_idxs", "rope_scaling_layers")
PREFIX = ("max_window_layers", "first_k_dense_replace")  # count layers from the first
# Tie layers to one another in ways that removal would change silently.
REFUSED = (
    "num_kv_shared_layers",
    "per_layer_config",
    "kv_source_layers",
    "cross_layer_interval",
    "deepstack_layer_map",
)
COLUMNS = 256  # of a matrix that are changed at a time
PARTS = ("left", "right", "delta", "shift")
POST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_self_attn_layernorm")


def pruned_config(config: Any, plan: Plan) -> Any:
    """A copy of a model config whose text part has the layers of `plan`.

    Raises:
        SvlError: if a field ties layers together, or may have one value per layer and is not known to be such.
    """
    config = copy.deepcopy(config)
    if not plan.removed:
        return config
    text = config.get_text_config(decoder=True)
    kept = plan.kept
    for name, value in list(text.to_dict().items()):
        new: Any
        if value and (name in REFUSED or (name == "decoder_sparse_step" and value > 1)):
            raise SvlError(
                f"layers of {text.model_type} depend on one another ('{name}'): removing some is not supported"
            )
        if name in INDEX_SETS and isinstance(value, list):
            new = [kept.index(i) for i in value if i in kept]
        elif name in PREFIX and isinstance(value, int):
            new = sum(i < value for i in kept)
        elif isinstance(value, list | tuple) and len(value) == plan.n_layers:
            if name not in PER_LAYER:
                raise SvlError(
                    f"config field '{name}' of {text.model_type} may be per-layer, and pruning it is unknown"
                )
            new = [value[i] for i in kept]
        elif name in DEPTH and value == plan.n_layers:
            new = len(kept)
        else:
            continue
        setattr(text, name, new)
    return config


def check_foldable(lvlm: Lvlm) -> None:
    """Raise SvlError if a norm stands between projections and residual stream: it would undo updates."""
    norms = {name for layer in lvlm.layers for name, _ in layer.named_children() if name in POST_NORMS}
    if norms:
        raise SvlError(
            f"'{lvlm.name}' normalises after its projections ({', '.join(sorted(norms))}), which renormalises what a "
            "compensation folds into them; use compensation=none"
        )


def revise(tensor: Tensor, update: Update, flipped: bool = False) -> Tensor:
    """W + left @ right @ W + delta in fp32, in W's dtype: `tensor` is a weight [d, n_in] or a bias [d].

    Experts [E, d, n_in] are revised one by one; `flipped` matrices are stored as [n_in, d]. Matrices are taken by
    blocks of columns, so that fp32 copies stay small, and always by the same ones, so that a result is the same bit
    for bit wherever it is computed.
    """
    result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    for new, old in zip(result, tensor, strict=True) if tensor.ndim == 3 else ((result, tensor),):
        if flipped and old.ndim > 1:
            new, old = new.mT, old.mT
        extra = update.delta if old.ndim > 1 else update.shift
        for start in range(0, old.shape[1] if old.ndim > 1 else 1, COLUMNS):
            block = (slice(None), slice(start, start + COLUMNS)) if old.ndim > 1 else (slice(None),)
            wide = old[block].detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            total = wide
            if update.left is not None:
                total = wide + update.left.to(wide) @ (wide if update.right is None else update.right.to(wide) @ wide)
            new[block] = total if extra is None else total + extra[block].to(wide)
    return result


def projections(layer: nn.Module) -> list[str]:
    """Names of a layer's projections: matrices and the biases beside them, not the norms."""
    matrices = {n.rpartition(".")[0] for n, p in layer.named_parameters() if p.ndim > 1}
    return [n for n, p in layer.named_parameters() if p.ndim > 1 or n.rpartition(".")[0] in matrices]


def blend(tensors: dict[int, Tensor], coefficients: dict[int, float]) -> Tensor:
    """The sum of coefficient x tensor over layers in fp32, in the tensors' dtype.

    Raises:
        SvlError: if the tensors differ in shape.
    """
    shapes = {tuple(t.shape) for t in tensors.values()}
    if len(shapes) != 1:
        raise SvlError(f"layers {sorted(tensors)} cannot be merged: their weights have shapes {sorted(shapes)}")
    total: Tensor = sum(c * tensors[k].detach().float() for k, c in coefficients.items())  # type: ignore[assignment]
    return total.to(next(iter(tensors.values())).dtype)


def apply(lvlm: Lvlm, plan: Plan, patch: Patch | None = None) -> Lvlm:
    """The pruned model. Shares all unchanged tensors with `lvlm`, which stays as it is.

    Raises:
        SvlError: if the plan is for another depth, or the patch names a removed layer or an unknown writer.
    """
    anatomy, model = lvlm.anatomy, lvlm.model
    if plan.n_layers != anatomy.n_layers:
        raise SvlError(f"the plan is for {plan.n_layers} decoder layers, but '{lvlm.name}' has {anatomy.n_layers}")
    if forbidden := set(plan.removed) & set(anatomy.protected):
        raise SvlError(f"the plan removes layers {sorted(forbidden)}, which '{lvlm.name}' needs to work")
    new_index = {old: new for new, old in enumerate(plan.kept)}
    dense = model.state_dict()
    state = _renamed(dense, anatomy.layers, new_index)
    for layer, terms in (patch.blends if patch else {}).items():
        if layer not in new_index:
            raise SvlError(f"the patch blends layer {layer}, which the pruned model does not have")
        for rest in projections(lvlm.layers[layer]):
            state[f"{anatomy.layers}.{new_index[layer]}.{rest}"] = blend(
                {k: dense[f"{anatomy.layers}.{k}.{rest}"] for k in terms}, terms
            )
    for (layer, role), update in (patch.updates if patch else {}).items():
        if layer not in new_index or role not in anatomy.writers:
            raise SvlError(f"the patch changes '{role}' of layer {layer}, which the pruned model does not have")
        stem = f"{anatomy.layers}.{new_index[layer]}.{anatomy.writers[role]}"
        if update.shift is not None and f"{stem}.bias" not in state:
            raise SvlError(f"the patch shifts the bias of '{role}' of layer {layer}, which has none")
        for name in (f"{stem}.weight", f"{stem}.bias"):
            if name in state:
                state[name] = revise(state[name], update)

    with torch.device("meta"):  # no memory, no random numbers: every tensor comes from the dense model
        pruned = type(model)._from_config(
            pruned_config(model.config, plan), attn_implementation=_attention(model.config), dtype=model.dtype
        )
    missing, unexpected = pruned.load_state_dict(state, strict=False, assign=True)
    pruned.tie_weights()
    buffers = _renamed(dict(model.named_buffers()), anatomy.layers, new_index)
    for name, buffer in list(pruned.named_buffers()):
        if buffer.is_meta and name in buffers:  # non-persistent ones (rotary tables) are in no state dict
            module, _, leaf = name.rpartition(".")
            pruned.get_submodule(module)._buffers[leaf] = buffers[name]
    hollow = [n for n, t in (*pruned.named_parameters(), *pruned.named_buffers()) if t.is_meta]
    if hollow or unexpected:
        raise RuntimeError(f"surgery on {type(model).__name__} left {hollow} empty, {unexpected} unused ({missing=})")
    pruned.requires_grad_(False)
    protected = tuple(new_index[i] for i in anatomy.protected)
    pruned.generation_config = copy.deepcopy(model.generation_config)
    if hasattr(model, "_weight_conversions"):  # keeps the key layout of the source on disk
        pruned._weight_conversions = model._weight_conversions
    return replace(lvlm, model=pruned.eval(), anatomy=replace(anatomy, n_layers=len(new_index), protected=protected))


def _attention(config: Any) -> Any:
    """The attention implementations of a config and its parts, as `_from_config` takes them."""
    parts = {name: getattr(config, name)._attn_implementation for name in config.sub_configs if hasattr(config, name)}
    return {"": config._attn_implementation, **parts} if parts else config._attn_implementation


def _renamed(tensors: dict[str, Tensor], layers: str, new_index: dict[int, int]) -> dict[str, Tensor]:
    """`tensors` without those of removed layers, the others under their new layer number."""
    result = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{layers}."):
            index, _, rest = name[len(layers) + 1 :].partition(".")
            if int(index) not in new_index:
                continue
            name = f"{layers}.{new_index[int(index)]}.{rest}"
        result[name] = tensor
    return result


def save_patch(patch: Patch, file: Path) -> None:
    """Write a patch as safetensors: `<layer>.<writer>.<part>` for the parts of `Update`, blends in the metadata."""
    save_file(
        {
            f"{layer}.{role}.{part}": tensor.cpu().clone().contiguous()
            for (layer, role), update in patch.updates.items()
            for part in PARTS
            if (tensor := getattr(update, part)) is not None
        },
        file,
        {"blends": json.dumps(patch.blends)},
    )


def load_patch(file: Path) -> Patch:
    """Read what `save_patch` wrote."""
    parts: dict[tuple[int, str], dict[str, Tensor]] = {}
    with safe_open(file, "pt") as source:
        for name in source.keys():  # noqa: SIM118 (not a dict)
            layer, role, part = name.split(".")
            parts.setdefault((int(layer), role), {})[part] = source.get_tensor(name)
        blends = json.loads((source.metadata() or {}).get("blends", "{}"))
    return Patch(
        {key: Update(**update) for key, update in sorted(parts.items())},
        {int(layer): {int(k): c for k, c in terms.items()} for layer, terms in blends.items()},
    )
