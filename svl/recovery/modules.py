"""Which parts of a pruned model there are to train: its projector, layers, linear modules, layers beside gaps."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from svl.core import Plan, SvlError, one_of
from svl.models.anatomy import WRITERS, find_writer
from svl.models.lvlm import Lvlm
from svl.pruning.cut_maps import ENTERING, LEAVING

# What stands between a vision tower and a decoder, by the names of modules in Hugging Face models.
PROJECTORS = re.compile(
    r"((multi_?modal|mm|vision|image|visual|language)_)?(projector|projection|connector|merger|aligner|adapter|"
    r"abstractor|resampler|q_?former)(_list)?|deepstack_merger_list|attn_pool|image_to_text_projection|query_tokens|"
    r"(img|image|vision)_(projection|embed_tokens).*|embed_vision|visual_embeddings_table"
)
TARGETS = ("all", "attn", "mlp")
ATTENTION = re.compile(r".*(attn|attention|conv|mamba|mixer).*")  # blocks of layers whose writers do not tell
# Children of layers that only a block of this role reads, or that read only what it writes.
BESIDE = {
    "attn": {"input_layernorm", "post_self_attn_layernorm", "self_attn_layer_norm", "operator_norm"},
    "mlp": {
        *("pre_feedforward_layernorm", "post_feedforward_layernorm", "post_mlp_layernorm", "ffn_norm"),
        *("final_layer_norm", "fc1"),
    },
}
BETWEEN = "post_attention_layernorm"  # before the MLP, or, where that has a norm of its own, behind the attention


def projector_tensors(pruned: Lvlm, modules: Collection[str] = ()) -> tuple[str, ...]:
    """Names of the parameters of what brings visual features to the decoder; empty if no such module is found.

    Args:
        pruned: the model.
        modules: dotted paths of these modules, where their names do not tell.

    Raises:
        SvlError: if there is no module of a path in `modules`, or it is, holds or is part of decoder layers: these
            have other numbers in the pruned model, and other methods train them.
    """
    layers = pruned.anatomy.layers
    for path in modules:
        if not path or f"{path}.".startswith(f"{layers}.") or f"{layers}.".startswith(f"{path}."):
            raise SvlError(
                f"recovery.modules names '{path}', but decoder layers ('{layers}') are trained by recovery=lora, "
                "distill or interlace: name modules beside them"
            )
    every = dict(pruned.model.named_modules())
    if missing := [path for path in modules if path not in every]:
        raise SvlError(f"recovery.modules names '{missing[0]}', but '{pruned.name}' has no such module")
    found = tuple(modules) or tuple(path for path in every if _is_projector(path, pruned))
    within = tuple(f"{path}." for path in found)
    tensors, seen = [], set()
    for name, parameter in pruned.model.named_parameters(remove_duplicate=False):
        is_found = name.startswith(within) or (not modules and _is_projector(name, pruned))
        if is_found and id(parameter) not in seen:  # a tied one once
            tensors.append(name)
            seen.add(id(parameter))
    return tuple(tensors)


def _is_projector(path: str, pruned: Lvlm) -> bool:
    """Whether a module, or a parameter of its own, is one by its name, not in a tower's layers or embeddings."""
    if not pruned.takes_images or path.startswith(f"{pruned.anatomy.layers}."):
        return False
    above, _, name = path.rpartition(".")
    inside = any(part.isdigit() or "embeddings" in part for part in above.split("."))
    return not inside and PROJECTORS.fullmatch(name) is not None


def layer_tensors(pruned: Lvlm, plan: Plan, layers: Collection[int]) -> tuple[str, ...]:
    """Names of all parameters of kept layers, which are given by their numbers in the dense model.

    Not of attentions and MLPs that the plan removes, nor of norms that serve these alone, nor of maps at cuts, which
    the dense model does not have.
    """
    found: list[str] = []
    for layer in sorted(layers):
        number = plan.kept.index(layer)
        gone = _removed_blocks(pruned, plan, layer)
        for name, _ in pruned.layers[number].named_parameters():
            if name.partition(".")[0] not in (*gone, ENTERING, LEAVING):
                found.append(f"{pruned.anatomy.layers}.{number}.{name}")
    return tuple(found)


def _blocks(layer: nn.Module, role: str, width: int) -> set[str]:
    """Names of the children of a layer that write in a role ("attn", "mlp"), as far as its writers tell."""
    writer = find_writer(layer, WRITERS[role], width)
    return {name.partition(".")[0] for name in writer.matrices} if writer else set()


def _removed_blocks(pruned: Lvlm, plan: Plan, layer: int) -> set[str]:
    """The children of a kept layer that a plan removes, and of which zeros may be left (svl.pruning.sublayers); and
    what serves these alone, so that nothing depends on it."""
    module, width = pruned.layers[plan.kept.index(layer)], pruned.anatomy.hidden_size
    roles = [role for i, role in plan.sublayers if i == layer]
    return {name for role in roles for name in (*_blocks(module, role, width), *_beside(module, role))}


def _beside(layer: nn.Module, role: str) -> set[str]:
    children = {name for name, _ in layer.named_children()}
    if not getattr(layer, "do_layer_norm_before", True):  # norms of the stream itself
        return children & {"fc1"} if role == "mlp" else set()
    own = {other: children & names for other, names in BESIDE.items()}
    own["attn" if own["mlp"] & {"pre_feedforward_layernorm"} else "mlp"] |= children & {BETWEEN}
    return own[role] if own["mlp"] else set()  # without a norm of its own, the MLP reads the attention's, too


def linear_modules(pruned: Lvlm, plan: Plan, layers: Collection[int], targets: str) -> tuple[str, ...]:
    """Paths of the linear modules (`targets`: all | attn | mlp) of kept layers, given by their dense numbers.

    `mlp` is all that is no attention, or what a layer has in its place (a convolution, a recurrence). What the plan
    removes is passed over, and so are layers without the part that is asked for.

    Raises:
        SvlError: if a layer that lacks nothing has no linear module, or no layer has such a part.
    """
    one_of("recovery.targets", targets, TARGETS)
    advice = "choose other targets, or recovery=interlace, which trains layers as they are"
    found: list[str] = []
    for layer in sorted(layers):
        number, gone = plan.kept.index(layer), _removed_blocks(pruned, plan, layer)
        module = pruned.layers[number]
        attention = _blocks(module, "attn", pruned.anatomy.hidden_size)
        every = [name for name, inner in module.named_modules() if type(inner).forward is nn.Linear.forward]
        if not every and not any(i == layer for i, _ in plan.sublayers):
            raise SvlError(f"LoRA cannot attach to layer {layer} of '{pruned.name}': it has no linear module; {advice}")
        for name in every:
            block = name.partition(".")[0]
            is_attention = block in attention or ATTENTION.fullmatch(block) is not None
            if block not in gone and (targets == "all" or is_attention == (targets == "attn")):
                found.append(f"{pruned.anatomy.layers}.{number}.{name}")
    if not found:
        raise SvlError(f"LoRA cannot attach to '{pruned.name}': no layer has recovery.targets={targets}; {advice}")
    return tuple(found)


def layers_beside_gaps(plan: Plan) -> tuple[int, ...]:
    """The kept layers right before and right behind each run of removed ones, and those that lack a part."""
    beside = {i for start, stop in plan.runs for i in (start - 1, stop)} | {i for i, _ in plan.sublayers}
    return tuple(i for i in plan.kept if i in beside)


def nearest_kept(plan: Plan) -> tuple[int, ...]:
    """For each removed layer in turn, the nearest kept one that is not taken yet; of two, the one behind it."""
    free, taken = set(plan.kept), []
    for gone in plan.removed:
        if not free:
            break
        taken.append(min(free, key=lambda i: (abs(i - gone), i < gone)))
        free.discard(taken[-1])
    return tuple(sorted(taken))
