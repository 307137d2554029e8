"""What a pruned checkpoint consists of, tensor by tensor, planned from headers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from svl.checkpoints.converted_tensors import Content, converted_groups, read_content
from svl.checkpoints.safetensors_files import StoredTensor, row_blocks
from svl.checkpoints.safetensors_writing import Blocks, NewTensor
from svl.checkpoints.skeleton import Skeleton
from svl.core.errors import SvlError
from svl.core.patch import JoinedPart, Patch, TensorChange, Update
from svl.core.plan import Plan
from svl.models.loading import is_prediction_layer
from svl.models.transformers_internals import Destination, match_names, missing_parameters
from svl.pruning import folding, joining, surgery, trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan_tensors(dense: Skeleton, plan: Plan, patch: Patch) -> Iterator[NewTensor]:
    """What the new checkpoint consists of, in the order in which it lies at the source.

    Raises:
        SvlError: if the names on disk do not number decoder layers in one way, or the patch does not fit.
    """
    folding.check_patch_for_model(patch, plan, dense.anatomy, dense.layers)
    trained.check_trained(patch.trained, plan, dense.anatomy, dense.model)
    prefix, new_index = layer_prefix(dense), {old: new for new, old in enumerate(plan.kept)}
    blended, updated = blended_parameters(dense, patch), updated_parameters(dense, patch)
    converted = converted_groups(dense, patch.trained)
    for key, stored in dense.stored.items():
        number, rest = split_layer_number(key, prefix)
        if number is not None and number not in new_index:
            continue  # removed, or a prediction layer
        name = key if number is None else f"{prefix}.{new_index[number]}.{rest}"
        place, shape = dense.places.get(key), stored.shape
        content: Content = stored
        if place and number is not None and place.name in blended:
            sources = {k: dense.stored.get(f"{prefix}.{k}.{rest}") for k in patch.blends[number]}
            content = blended_content(name, stored, sources, patch.blends[number])
        if place and number in patch.joins:
            content = joined_content(dense, place, f"{prefix}.{{}}.{rest}", patch.joins[number])
        if place and place.name in updated:
            content = updated_content(content, stored, dense, place, *updated[place.name])
        if key in converted:
            content = converted[key].trained_content(key, content)
        elif place and place.name in patch.trained:
            content = trained_content(content, stored, dense, place, patch.trained[place.name])
        if place and plan.removed and (axis := surgery.packed_axis(place.name, dense.anatomy.layers)) is not None:
            content = kept_slices(stored, axis, plan)
            shape = tuple(n * len(plan.kept) // plan.n_layers if i == axis else n for i, n in enumerate(shape))
        yield NewTensor(name, stored.dtype, shape, content)


# ------------------------------------------------------------------------------------------------- patches


def blended_parameters(dense: Skeleton, patch: Patch) -> set[str]:
    """Parameters of the dense model that the patch blends."""
    layers = dense.anatomy.layers
    return {f"{layers}.{i}.{rest}" for i in patch.blends for rest in folding.projections(dense.layers[i])}


def blended_content(
    name: str, stored: StoredTensor, sources: dict[int, StoredTensor | None], coefficients: dict[int, float]
) -> Blocks:
    """The weighted sum of tensors on disk, by blocks of rows.

    Raises:
        SvlError: if one is missing or has another shape.
    """
    same = {k: source for k, source in sources.items() if source is not None and source.shape == stored.shape}
    if len(same) < len(sources):
        raise SvlError(f"layers cannot be merged into '{name}': their weights differ in shape")

    def compute() -> Iterator[Tensor]:
        for start, stop in row_blocks(stored):
            yield folding.blend_tensors({k: source.read(start, stop) for k, source in same.items()}, coefficients)

    return compute


def joined_content(dense: Skeleton, place: Destination, name: str, parts: tuple[JoinedPart, ...]) -> Blocks:
    """A tensor put together from those of several layers; `name` has a gap for the layer's number.

    Raises:
        SvlError: if the disk has it other than the model does.
    """
    if place.converter:
        raise SvlError(f"the layout of '{dense.folder}' is not known: '{place.name}' cannot be joined as it is stored")
    number, rest = split_layer_number(place.name, dense.anatomy.layers)
    shapes = folding.parameter_shapes(dense.layers[cast(int, number)])
    rule = joining.join_rules(shapes, parts, dense.anatomy.hidden_size)[rest]

    def compute() -> Iterator[Tensor]:
        sources = {p.layer: dense.stored[name.format(p.layer)].read() for p in parts}
        yield joining.join_tensors(rest, sources, parts, rule)

    return compute


def updated_parameters(dense: Skeleton, patch: Patch) -> dict[str, tuple[Update, bool]]:
    """Parameters of the dense model that the patch updates, and whether the model has them as [.., n_in, d]."""
    found = {}
    for (layer, role), update in patch.updates.items():
        for name, transposed in folding.tensors_of_update(dense.anatomy, layer, role, update).items():
            found[f"{dense.anatomy.layers}.{layer}.{name}"] = (update, transposed)
    return found


def updated_content(
    content: Content,
    stored: StoredTensor,
    dense: Skeleton,
    place: Destination,
    update: Update,
    transposed: bool,
) -> Blocks:
    """A tensor on disk with an update folded into it; `transposed` if the model has it as [.., n_in, d].

    Raises:
        SvlError: if the disk has it other than as a matrix, or one of several, either way round.
    """
    kinds = {type(op).__name__ for op in place.converter.operations} if place.converter else set()
    if not kinds <= {"Transpose", "MergeModulelist"}:
        raise SvlError(f"the layout of '{dense.folder}' is not known: it stores '{place.name}' by {', '.join(kinds)}")
    turned_on_disk = stored.shape[-2:] != tuple(dense.model.state_dict()[place.name].shape)[-2:]

    def compute() -> Iterator[Tensor]:
        yield folding.fold_update(read_content(content), update, transposed != turned_on_disk)

    return compute


def trained_content(
    content: Content, stored: StoredTensor, dense: Skeleton, place: Destination, change: TensorChange
) -> Blocks:
    """A tensor on disk as recovery has trained it.

    Raises:
        SvlError: if the disk has it other than the model does.
    """
    if stored.shape != tuple(dense.model.state_dict()[place.name].shape):
        raise SvlError(
            f"'{place.name}', which recovery has trained, is stored in another layout in '{dense.folder}', which is "
            "not known"
        )

    def compute() -> Iterator[Tensor]:
        yield trained.change_tensor(read_content(content), change)

    return compute


def kept_slices(stored: StoredTensor, axis: int, plan: Plan) -> Blocks:
    """The parts of a tensor that belong to kept layers, of one equal part per layer along `axis` (0 or 1)."""

    def rows() -> Iterator[Tensor]:
        height = stored.shape[0] // plan.n_layers
        for i in plan.kept:
            yield stored.read(i * height, (i + 1) * height)

    def columns() -> Iterator[Tensor]:
        for start, stop in row_blocks(stored):
            parts = stored.read(start, stop).chunk(plan.n_layers, 1)
            yield torch.cat([parts[i] for i in plan.kept], 1)

    return columns if axis else rows


# --------------------------------------------------------------------------------------------- names on disk


def layer_prefix(dense: Skeleton) -> str:
    """The path before the number of a decoder layer in names on disk.

    Raises:
        SvlError: if there is no such path, or layers are numbered other than 0, 1, 2 ...
    """
    found: set[str] | None = None
    for key, place in dense.places.items():
        if (number := dense.layer(place.name)) is None:
            continue
        parts = key.split(".")
        paths = {".".join(parts[:i]) for i, part in enumerate(parts) if part == str(number)}
        found = paths if found is None else found & paths
    if not found or len(found) > 1:
        raise SvlError(
            f"the layout of '{dense.folder}' is not known: its names do not number decoder layers in one way"
        )
    (prefix,) = found
    for key in dense.stored:
        if key.startswith(f"{prefix}.") and split_layer_number(key, prefix)[0] is None:
            part = key[len(prefix) + 1 :].partition(".")[0]
            if any(letter.isnumeric() for letter in part) and not any(letter.isalpha() for letter in part):
                raise SvlError(f"the layout of '{dense.folder}' is not known: '{key}' numbers a layer as '{part}'")
    return prefix


def prediction_layers(dense: Skeleton, prefix: str) -> list[int]:
    """Layers on disk behind the last decoder layer that guess tokens further ahead; transformers does not load them.

    Raises:
        SvlError: if there are other layers behind the last.
    """
    found = set()
    for key in dense.stored:
        number, rest = split_layer_number(key, prefix)
        if number is None or number < dense.anatomy.n_layers:
            continue
        names = (key, f"{dense.anatomy.layers}.{number}.{rest}")
        if not any(is_prediction_layer(dense.model, dense.anatomy, name) for name in names):
            raise SvlError(f"the layout of '{dense.folder}' is not known: '{key}' is beyond the last decoder layer")
        found.add(number)
    return sorted(found)


def split_layer_number(name: str, prefix: str) -> tuple[int | None, str]:
    """Number and rest of a name `<prefix>.N.<rest>`; None and the name itself for any other."""
    found = re.match(rf"{re.escape(prefix)}\.(0|[1-9][0-9]{{0,8}})\.(.+)", name, re.DOTALL)
    return (int(found[1]), found[2]) if found else (None, name)


def check_fits(tensors: Iterable[NewTensor], pruned: PreTrainedModel, dense: Skeleton) -> None:
    """Raise SvlError unless `tensors` make the model `pruned`, each parameter in its shape and none missing."""
    parameters = pruned.state_dict()
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    places = match_names(pruned, shapes)
    wrong: Sequence[str] = [
        name
        for name, place in places.items()
        if place.converter is None and tuple(parameters[place.name].shape) != shapes[name]
    ]
    if wrong := [*wrong, *missing_parameters(pruned, places)]:
        raise SvlError(f"the layout of '{dense.folder}' is not known: '{wrong[0]}' does not fit the pruned model")
