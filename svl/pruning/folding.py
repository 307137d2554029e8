"""Whether a patch fits, and folding it into weights: arithmetic that surgery and export share, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from svl.core.errors import SvlError
from svl.core.patch import JoinedPart, Patch, Update
from svl.core.plan import Plan
from svl.models.anatomy import Anatomy
from svl.models.lvlm import Lvlm
from svl.pruning.joining import join_rules

if TYPE_CHECKING:
    from svl.core.methods import Compensation

BLOCK_COLUMNS = 256  # of a matrix that are changed at a time
POST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_self_attn_layernorm")


def check_foldable(lvlm: Lvlm) -> None:
    """Raise SvlError if a norm stands between projections and residual stream: it would undo updates.

    That is what names tell, of models on the meta device, too; `layer_trials.check_folding` tries it out.
    """
    norms = {name for layer in lvlm.layers for name, _ in layer.named_children() if name in POST_NORMS}
    norms |= {"norm_after" for layer in lvlm.layers if getattr(layer, "norm_after", False)}
    if norms:
        raise SvlError(
            f"'{lvlm.name}' normalises after its projections ({', '.join(sorted(norms))}), which renormalises what a "
            "compensation folds into them; use compensation=none"
        )


def check_single(compensation: Compensation, plan: Plan, anatomy: Anatomy) -> None:
    """Raise SvlError if a compensation changes weights one by one where several write in one role (experts)."""
    for layer, role in compensation.refitted(plan):
        if role in anatomy.writers and not anatomy.writers[role][layer].single:
            raise SvlError(
                f"the writer '{role}' of layer {layer} has several matrices, but {type(compensation).__name__} needs "
                "one to refit; choose another compensation, or compensation.targets without it"
            )


def check_single_somewhere(compensation: Compensation, anatomy: Anatomy) -> None:
    """Raise SvlError as `check_single` does if it would for every plan by which weights change."""
    plans = [Plan(anatomy.n_layers, (layer,)) for layer in anatomy.removable if anatomy.n_layers > 1]
    plans = [plan for plan in plans if compensation.refitted(plan)]
    problems = []
    for plan in plans:  # what bars it bars each plan whose first run begins there
        try:
            check_single(compensation, plan, anatomy)
        except SvlError as error:
            problems.append(error)
    if problems and len(problems) == len(plans):
        raise problems[0]


def check_patch_for_model(patch: Patch, plan: Plan, anatomy: Anatomy, layers: nn.ModuleList) -> None:
    """Raise SvlError unless a patch is for the layers that a plan keeps, in shapes that fit, of real, finite numbers.

    `layers` are the dense model's; they may be on the meta device.
    """
    scaled = any(update.scale for update in patch.updates.values())
    if scaled and (gone := sorted(set(plan.removed) & set(anatomy.waived))):
        raise SvlError(
            f"the patch scales what layers write, but without layers {gone}, which model.protect does not spare, more "
            "than that may enter behind a gap, such as visual features (DeepStack); choose another compensation"
        )
    for layer, terms in patch.blends.items():
        if layer not in plan.kept:
            raise SvlError(f"the patch blends layer {layer}, which the pruned model does not have")
        if not terms or not set(terms) <= set(range(plan.n_layers)):
            raise SvlError(f"the patch blends layer {layer} of layers {sorted(terms)}: not of 0..{plan.n_layers - 1}")
        if not all(isinstance(c, int | float) and math.isfinite(c) for c in terms.values()):
            raise SvlError(f"the patch blends layer {layer} with coefficients that are not finite numbers")
        check_blend(layer, terms, layers)
    starts = [start for start, _ in plan.runs]
    for start, matrix in patch.maps.items():
        if start not in starts:
            raise SvlError(f"the patch has a map at layer {start}, where no removed run begins (these do: {starts})")
        check_part(matrix, (anatomy.hidden_size,) * 2, f"the map of the patch at layer {start}")
    for layer, parts in patch.joins.items():
        check_join(layer, parts, plan, layers, anatomy.hidden_size)
    for (layer, role), update in patch.updates.items():
        if layer not in plan.kept:
            raise SvlError(f"the patch changes '{role}' of layer {layer}, which the pruned model does not have")
        names = tensors_of_update(anatomy, layer, role, update)
        width, rank = anatomy.hidden_size, anatomy.hidden_size
        if update.left is not None and update.right is not None and update.left.ndim == 2:
            rank = update.left.shape[1]
        if update.scale is not None and not (isinstance(update.scale, int | float) and math.isfinite(update.scale)):
            raise SvlError(f"the patch scales '{role}' of layer {layer} by {update.scale!r}, which is no finite number")
        expected = {"left": (width, rank), "right": (rank, width), "shift": (width,)}
        if update.delta is not None or update.weight is not None:
            shape = tuple(layers[layer].get_parameter(next(iter(names))).shape)
            expected |= {"delta": shape, "weight": shape}
        for part, shape in expected.items():
            check_part(getattr(update, part), shape, f"'{part}' of the patch for '{role}' of layer {layer}")


def check_blend(layer: int, sources: Collection[int], layers: nn.ModuleList) -> None:
    """Raise SvlError if projections of `sources` differ in names or shapes from those of the layer that they become."""
    own = projection_shapes(layers[layer])
    if unlike := [i for i in sources if projection_shapes(layers[i]) != own]:
        raise SvlError(
            f"layers {sorted({layer, *sources})} cannot be merged: projections of layer {unlike[0]} differ in names or "
            f"shapes from those of layer {layer}; choose another compensation, or other layers"
        )


def check_join(layer: int, parts: tuple[JoinedPart, ...], plan: Plan, layers: nn.ModuleList, hidden: int) -> None:
    """Raise SvlError unless a layer that the plan keeps, of width `hidden`, can be joined from these parts."""
    sources = [part.layer for part in parts]
    if layer not in plan.kept:
        raise SvlError(f"the patch joins layer {layer}, which the pruned model does not have")
    if not sources or len(set(sources)) < len(sources) or not set(sources) <= set(range(plan.n_layers)):
        raise SvlError(
            f"the patch joins layer {layer} of layers {sources}: not different ones of 0..{plan.n_layers - 1}"
        )
    if not all(math.isfinite(part.norm) and math.isfinite(part.share) for part in parts):
        raise SvlError(f"the patch joins layer {layer} with coefficients that are not finite numbers")
    named = [parameter_shapes(layers[i]) for i in (layer, *sources)]
    if any(shapes != named[0] for shapes in named):
        raise SvlError(f"layers {sources} cannot be joined: their weights differ in names or shapes")
    join_rules(named[0], parts, hidden)


def check_part(part: Tensor | None, shape: tuple[int, ...], what: str) -> None:
    """Raise SvlError unless a part of an update (`what`, in messages) has this shape, and real, finite numbers."""
    if part is None:
        return
    if tuple(part.shape) != shape:
        raise SvlError(f"{what} has shape {tuple(part.shape)}, but must have {shape}")
    if not part.is_floating_point() or not bool(part.isfinite().all()):
        raise SvlError(f"{what} must consist of real, finite numbers")


def fold_update(tensor: Tensor, update: Update, flipped: bool = False) -> Tensor:
    """scale (W + left @ right @ W + delta) in fp32, in W's dtype: `tensor` is a weight [d, n_in] or a bias [d].

    Of an update with a `weight`, that is W.

    Experts [E, d, n_in] are changed one by one; `flipped` matrices are stored as [n_in, d]. Matrices are taken by
    blocks of columns, so that fp32 copies stay small, and always by the same ones, so that a result is the same bit
    for bit wherever it is computed.
    """
    if update.weight is not None and tensor.ndim > 1:
        tensor = (update.weight.mT if flipped else update.weight).to(tensor)
    factors = [part.to(tensor.device, torch.float32) for part in (update.right, update.left) if part is not None]
    result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    for new, old in zip(result, tensor, strict=True) if tensor.ndim == 3 else ((result, tensor),):
        if old.ndim == 1:
            new[:] = _folded(old, factors, update.shift, update.scale)
            continue
        if flipped:
            new, old = new.mT, old.mT
        for start in range(0, old.shape[1], BLOCK_COLUMNS):
            block = (slice(None), slice(start, start + BLOCK_COLUMNS))
            extra = None if update.delta is None else update.delta[block]
            new[block] = _folded(old[block], factors, extra, update.scale)
    return result


def _folded(block: Tensor, factors: Sequence[Tensor], extra: Tensor | None, scale: float | None) -> Tensor:
    """scale (block + product of the factors, the last one leftmost, and block + extra), in fp32."""
    wide = block.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    total = wide
    if factors:
        product = wide
        for factor in factors:
            product = factor @ product
        total = wide + product
    if extra is not None:
        total = total + extra.to(wide)
    return total if scale is None else scale * total


def parameter_shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's parameters, by name."""
    return {name: tuple(p.shape) for name, p in layer.named_parameters()}


def projection_shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's `projections`, by name."""
    shapes = parameter_shapes(layer)
    return {name: shapes[name] for name in projections(layer)}


def merge_kinds(anatomy: Anatomy, layers: nn.ModuleList) -> tuple[int | None, ...]:
    """`core.Stats.kinds` of a model's `layers`, which may be on the meta device."""
    first: list[dict[str, tuple[int, ...]]] = []
    kinds: list[int | None] = []
    for i, layer in enumerate(layers):
        shapes = projection_shapes(layer)
        if shapes not in first:
            first.append(shapes)
        kinds.append(None if i < anatomy.entered else first.index(shapes))
    return tuple(kinds)


def projections(layer: nn.Module) -> list[str]:
    """Names of a layer's projections: matrices and the biases beside them, not the norms."""
    matrices = {n.rpartition(".")[0] for n, p in layer.named_parameters() if p.ndim > 1}
    return [n for n, p in layer.named_parameters() if p.ndim > 1 or n.rpartition(".")[0] in matrices]


def blend_tensors(tensors: dict[int, Tensor], coefficients: dict[int, float]) -> Tensor:
    """The sum of coefficient x tensor over layers in fp32, in the tensors' dtype.

    Raises:
        SvlError: if the tensors differ in shape.
    """
    shapes = {tuple(t.shape) for t in tensors.values()}
    if len(shapes) != 1:
        raise SvlError(f"layers {sorted(tensors)} cannot be merged: their weights have shapes {sorted(shapes)}")
    first = next(iter(tensors.values()))
    total = torch.zeros_like(first, dtype=torch.float32)
    for layer, coefficient in coefficients.items():
        total = total + coefficient * tensors[layer].detach().float()
    return total.to(first.dtype)


def tensors_of_update(anatomy: Anatomy, layer: int, role: str, update: Update) -> dict[str, bool]:
    """The tensors of a layer that an update of its writer `role` changes -> whether they are stored as [.., n_in, d].

    Raises:
        SvlError: if there is no such writer, or the update has parts that it cannot take.
    """
    if role not in anatomy.writers:
        raise SvlError(f"the patch changes '{role}' of layer {layer}, which the pruned model does not have")
    writer = anatomy.writers[role][layer]
    if update.shift is not None and not (writer.single and writer.biases):
        raise SvlError(f"the patch shifts the bias of '{role}' of layer {layer}, which has none")
    if (update.delta is not None or update.weight is not None) and not writer.single:
        raise SvlError(
            f"the patch has a matrix for '{role}' of layer {layer}, but {len(writer.matrices)} tensors ("
            f"{', '.join(writer.matrices)}) write there together; choose a compensation that multiplies"
        )
    return {**writer.matrices, **dict.fromkeys(writer.biases, False)}
