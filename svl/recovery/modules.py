"""Which parts of a pruned model there are to train: its projector, layers, linear modules, layers beside gaps."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from svl.core import Plan, SvlError, one_of
from svl.models.lvlm import Lvlm

# What stands between a vision tower and a decoder, by the names of modules in Hugging Face models.
PROJECTORS = re.compile(
    r"((multi_?modal|mm|vision|image|visual)_)?(projector|projection|connector|merger|aligner|adapter|abstractor|"
    r"resampler)(_list)?|deepstack_merger_list|attn_pool"
)
BLOCKS = {"all": "", "attn": "attn", "mlp": "mlp"}  # linear modules of a layer, by what the path to them contains


def projector_tensors(pruned: Lvlm, modules: Collection[str] = ()) -> tuple[str, ...]:
    """Names of the parameters of what brings visual features to the decoder; empty if no such module is found.

    Args:
        pruned: the model.
        modules: dotted paths of these modules, where their names do not tell.

    Raises:
        SvlError: if there is no module of a path in `modules`.
    """
    every = dict(pruned.model.named_modules())
    if missing := [path for path in modules if path not in every]:
        raise SvlError(f"recovery.modules names '{missing[0]}', but '{pruned.name}' has no such module")
    found = tuple(modules) or tuple(path for path in every if _is_projector(path, pruned))
    names = (name for name, _ in pruned.model.named_parameters())
    return tuple(name for name in names if any(name.startswith(f"{path}.") for path in found))


def _is_projector(path: str, pruned: Lvlm) -> bool:
    if not pruned.takes_images or path.startswith(f"{pruned.anatomy.layers}."):
        return False
    return PROJECTORS.fullmatch(path.rpartition(".")[2]) is not None


def layer_tensors(pruned: Lvlm, plan: Plan, layers: Collection[int]) -> tuple[str, ...]:
    """Names of all parameters of kept layers, which are given by their numbers in the dense model."""
    prefixes = tuple(f"{pruned.anatomy.layers}.{plan.kept.index(i)}." for i in sorted(layers))
    return tuple(name for name, _ in pruned.model.named_parameters() if name.startswith(prefixes))


def linear_modules(pruned: Lvlm, plan: Plan, layers: Collection[int], targets: str) -> tuple[str, ...]:
    """Paths of the linear modules (`targets`: all | attn | mlp) of kept layers, given by their dense numbers.

    Raises:
        SvlError: if a layer has none.
    """
    one_of("recovery.targets", targets, tuple(BLOCKS))
    found: list[str] = []
    for layer in sorted(layers):
        number = plan.kept.index(layer)
        names = [name for name, module in pruned.layers[number].named_modules() if isinstance(module, nn.Linear)]
        names = [name for name in names if BLOCKS[targets] in name.partition(".")[0]]
        if not names:
            raise SvlError(
                f"LoRA cannot attach to layer {layer} of '{pruned.name}': it has no linear module (recovery.targets="
                f"{targets}); choose other targets, or recovery=interlace, which trains layers as they are"
            )
        found += [f"{pruned.anatomy.layers}.{number}.{name}" for name in names]
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
