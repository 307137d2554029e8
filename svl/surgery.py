"""The one surgeon: builds the model that a plan (and a patch) describe.

The pruned model is a new one, built from a pruned config and sharing every tensor that did not change. The dense
model is never touched, so undoing is forgetting: nothing to restore, no hook left behind. Building from the config
(instead of cutting the live list of layers) keeps all that a model derives from its depth right: cache slots, masks
per layer type, rotary settings. Only what a patch changes takes new memory.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from svl.core import Patch, Plan, SvlError, Update
from svl.loading import Anatomy, Lvlm

log = logging.getLogger(__name__)

DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "layers")  # config fields that count layers
PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types", "intermediate_size", "activation_sparsity_pattern")
INDEX_SETS = ("cross_attention_layers", "moe_layers", "mlp_only_layers", "full_attn_idxs", "rope_scaling_layers")
PREFIX = ("max_window_layers", "first_k_dense_replace")  # count layers from the first
SUFFIX = ("num_kv_shared_layers",)  # count layers from the last
BY_LAYER = ("per_layer_config",)  # dicts by layer number
# Tensors beside the layers that hold one slice per layer -> the axis that the slices lie along.
PACKED = {"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0}
COLUMNS = 256  # of a matrix that are changed at a time
PARTS = ("left", "right", "delta", "shift")
POST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_self_attn_layernorm")


def pruned_config(config: Any, plan: Plan) -> Any:
    """A copy of a model config whose text part has the layers of `plan`.

    Raises:
        SvlError: if a field may have one value per layer and is not known to be such, or transformers would read the
            new config otherwise than it is meant.
    """
    config = copy.deepcopy(config)
    if not plan.removed:
        return config
    text = config.get_text_config(decoder=True)
    before = text.to_dict()
    after = {**before, **pruned_fields(before, plan)}
    try:
        new = type(text).from_dict(copy.deepcopy(after))
        getattr(new, "kv_sharing_modes", None)  # computed, and checked, only when it is asked for
    except (ValueError, StrictDataclassError) as error:
        reason = str(error).splitlines()[0]
        raise SvlError(f"{text.model_type} cannot do without layers {list(plan.removed)}: {reason}") from error
    new.dtype = text.dtype
    for name, value in new.to_dict().items():
        if name in (*DEPTH, *PER_LAYER, *INDEX_SETS, *PREFIX, *SUFFIX) and _plain(value) != _plain(after.get(name)):
            raise SvlError(
                f"{text.model_type} cannot do without layers {list(plan.removed)}: with '{name}' {after.get(name)}, "
                f"it would be made with {value}"
            )
    if text is config:
        return new
    setattr(config, next(name for name in config.sub_configs if getattr(config, name, None) is text), new)
    return config


def pruned_fields(text: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """The fields of a text config that change with `plan`.

    Raises:
        SvlError: if a field may have one value per layer, and is not known to be such.
    """
    kept = plan.kept
    fields: dict[str, Any] = {}
    for name, value in text.items():
        if name in INDEX_SETS and isinstance(value, list | tuple):
            fields[name] = [kept.index(i) for i in value if i in kept]
        elif name in PREFIX and isinstance(value, int):
            fields[name] = sum(i < value for i in kept)
        elif name in SUFFIX and isinstance(value, int):
            fields[name] = sum(i >= plan.n_layers - value for i in kept)
        elif name in BY_LAYER and value:
            fields[name] = {kept.index(int(i)): own for i, own in value.items() if int(i) in kept}
        elif isinstance(value, list | tuple) and len(value) == plan.n_layers and "token_id" not in name:
            if name not in PER_LAYER:
                raise SvlError(
                    f"config field '{name}' of {text.get('model_type')} may be per-layer, and pruning it is unknown"
                )
            fields[name] = [value[i] for i in kept]
        elif name in DEPTH and value == plan.n_layers:
            fields[name] = len(kept)
    if (step := text.get("decoder_sparse_step") or 1) > 1:  # every step-th layer has experts: said layer by layer
        dense = text.get("mlp_only_layers") or ()
        fields["mlp_only_layers"] = [new for new, old in enumerate(kept) if (old + 1) % step or old in dense]
        fields["decoder_sparse_step"] = 1
    return fields


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value))


def check_foldable(lvlm: Lvlm) -> None:
    """Raise SvlError if a norm stands between projections and residual stream: it would undo updates."""
    norms = {name for layer in lvlm.layers for name, _ in layer.named_children() if name in POST_NORMS}
    norms |= {"norm_after" for layer in lvlm.layers if getattr(layer, "norm_after", False)}
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
        SvlError: if the plan is for another depth or removes protected layers, or the patch does not fit.
    """
    lvlm.must_be_whole("running the pruned model")
    anatomy, model = lvlm.anatomy, lvlm.model
    anatomy.check(plan, lvlm.name)
    new_index = {old: new for new, old in enumerate(plan.kept)}
    dense = model.state_dict()
    state = _kept(dense, anatomy, plan)
    for layer, terms in (patch.blends if patch else {}).items():
        if layer not in new_index:
            raise SvlError(f"the patch blends layer {layer}, which the pruned model does not have")
        for rest in projections(lvlm.layers[layer]):
            state[f"{anatomy.layers}.{new_index[layer]}.{rest}"] = blend(
                {k: dense[f"{anatomy.layers}.{k}.{rest}"] for k in terms}, terms
            )
    for (layer, role), update in (patch.updates if patch else {}).items():
        if layer not in new_index:
            raise SvlError(f"the patch changes '{role}' of layer {layer}, which the pruned model does not have")
        for name, flipped in changed(anatomy, layer, role, update).items():
            key = f"{anatomy.layers}.{new_index[layer]}.{name}"
            state[key] = revise(state[key], update, flipped)

    config = pruned_config(model.config, plan)
    with torch.device("meta"):  # no memory, no random numbers: every tensor comes from the dense model
        pruned = type(model)._from_config(config, attn_implementation=_attention(model.config), dtype=model.dtype)
    try:
        missing, unexpected = pruned.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # a layer came out with another shape than it had
        raise SvlError(
            f"'{lvlm.name}' cannot do without layers {list(plan.removed)}: {error}".splitlines()[0]
        ) from error
    pruned.tie_weights()
    buffers = _kept(dict(model.named_buffers()), anatomy, plan)
    for name, buffer in list(pruned.named_buffers()):
        if buffer.is_meta and name in buffers:  # non-persistent ones (rotary tables) are in no state dict
            module, _, leaf = name.rpartition(".")
            pruned.get_submodule(module)._buffers[leaf] = buffers[name]
    hollow = [n for n, t in (*pruned.named_parameters(), *pruned.named_buffers()) if t.is_meta]
    if hollow or unexpected:
        raise RuntimeError(f"surgery on {type(model).__name__} left {hollow} empty, {unexpected} unused ({missing=})")
    pruned.requires_grad_(False)
    pruned.generation_config = copy.deepcopy(model.generation_config)
    if hasattr(model, "_weight_conversions"):  # keeps the key layout of the source on disk
        pruned._weight_conversions = model._weight_conversions
    remaining = replace(
        anatomy,
        n_layers=len(new_index),
        writers={role: tuple(writers[i] for i in plan.kept) for role, writers in anatomy.writers.items()},
        protected={new_index[i]: why for i, why in anatomy.protected.items()},
        waived=tuple(new_index[i] for i in anatomy.waived if i in new_index),
    )
    return replace(lvlm, model=pruned.eval(), anatomy=remaining)


def changed(anatomy: Anatomy, layer: int, role: str, update: Update) -> dict[str, bool]:
    """The tensors of a layer that an update of its writer `role` changes -> whether they are stored as [.., n_in, d].

    Raises:
        SvlError: if there is no such writer, or the update has parts that it cannot take.
    """
    if role not in anatomy.writers:
        raise SvlError(f"the patch changes '{role}' of layer {layer}, which the pruned model does not have")
    writer = anatomy.writers[role][layer]
    if update.shift is not None and not (writer.single and writer.biases):
        raise SvlError(f"the patch shifts the bias of '{role}' of layer {layer}, which has none")
    if update.delta is not None and not writer.single:
        raise SvlError(
            f"the patch adds a matrix to '{role}' of layer {layer}, but {len(writer.matrices)} tensors ("
            f"{', '.join(writer.matrices)}) write there together; choose a compensation that multiplies"
        )
    return {**writer.matrices, **dict.fromkeys(writer.biases, False)}


# ------------------------------------------------------------------------------------------------ self-check


def example(lvlm: Lvlm) -> dict[str, Tensor]:
    """Inputs to try a model on: a short prompt, with a picture if it takes any and has a template that places it."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    seen = lvlm.sees and getattr(lvlm.processor, "chat_template", None) is not None
    if lvlm.sees and not seen:
        log.info("  surgery is checked on text: '%s' has no chat template that places a picture", lvlm.name)
    image = [Image.fromarray(pixels).resize((224, 224))] if seen else None
    return lvlm.encode([lvlm.prompt("What is in the picture, and where?", image=seen)], image)


def check(lvlm: Lvlm, pruned: Lvlm, plan: Plan, inputs: dict[str, Tensor]) -> float:
    """How far logits of `pruned` (of `plan` alone, no patch) are from those of the full model that skips layers.

    The largest difference, as a fraction of the largest logit. Layers that the full model skips run, and fill their
    cache, but pass on their input.

    Raises:
        SvlError: if it is more than rounding explains, unless the plan removes layers whose protection was waived.
    """
    handles = [lvlm.layers[i].register_forward_hook(_skip, with_kwargs=True) for i in plan.removed]
    try:
        with torch.inference_mode():
            expected = lvlm.model(**inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    with torch.inference_mode():
        logits = pruned.model(**inputs, use_cache=False).logits
    difference = float((logits - expected).float().abs().max() / expected.float().abs().max())
    allowed = 1e-3 if lvlm.model.dtype == torch.float32 else 5e-2
    if waived := sorted(set(plan.removed) & set(lvlm.anatomy.waived)):
        log.warning("  layers %s were removed against model.protect=auto: %.2g off", waived, difference)
    elif not difference <= allowed:
        raise SvlError(
            f"surgery on '{lvlm.name}' failed its check: without layers {list(plan.removed)}, logits are "
            f"{difference:.2g} (of the largest) away from those of the full model that skips them; please report this"
        )
    return difference


def _skip(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A layer's input in place of its output."""
    state = args[0] if args else kwargs["hidden_states"]
    return (state, *output[1:]) if isinstance(output, tuple) else state


# ------------------------------------------------------------------------------------------------ names, files


def _attention(config: Any) -> Any:
    """The attention implementations of a config and its parts, as `_from_config` takes them."""
    present = {name: part for name in config.sub_configs if (part := getattr(config, name, None)) is not None}
    parts = {name: part._attn_implementation for name, part in present.items()}
    return {"": config._attn_implementation, **parts} if parts else config._attn_implementation


def _kept(tensors: dict[str, Tensor], anatomy: Anatomy, plan: Plan) -> dict[str, Tensor]:
    """`tensors` without what belongs to removed layers, the others under their new layer number."""
    layers, new_index = anatomy.layers, {old: new for new, old in enumerate(plan.kept)}
    result = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{layers}."):
            index, _, rest = name[len(layers) + 1 :].partition(".")
            if int(index) not in new_index:
                continue
            name = f"{layers}.{new_index[int(index)]}.{rest}"
        elif (axis := packed(name, layers)) is not None and plan.removed:
            parts = tensor.chunk(plan.n_layers, axis)
            tensor = torch.cat([parts[i] for i in plan.kept], axis)
        result[name] = tensor
    return result


def packed(name: str, layers: str) -> int | None:
    """The axis along which a tensor beside the `layers` holds one slice per layer; None for all other tensors."""
    return PACKED.get(name.removeprefix(f"{layers.rpartition('.')[0]}."))


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
