"""Tensors that transformers converts on loading (experts one by one, fused projections), trained as the model has them.

How they are converted is not imitated: transformers loads the numbers of all elements on disk, which tells where each
of them goes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from svl.checkpoints.safetensors_files import StoredTensor
from svl.checkpoints.safetensors_writing import Blocks
from svl.checkpoints.skeleton import Skeleton
from svl.core.errors import SvlError
from svl.core.patch import TensorChange
from svl.models.transformers_internals import fill_model
from svl.pruning.surgery import set_tensor
from svl.pruning.trained import change_tensor

Content = StoredTensor | Blocks


@dataclass
class ConvertedGroup:
    """Tensors on disk that together make parameters of the model, some of which recovery has trained.

    Attributes:
        dense: the checkpoint.
        keys: their names on disk.
        targets: the parameters.
        trained: what recovery has made of some of these.
        contents: what the tensors on disk hold before it, by name; complete when all of them are planned.
    """

    dense: Skeleton
    keys: tuple[str, ...]
    targets: tuple[str, ...]
    trained: Mapping[str, TensorChange]
    contents: dict[str, Content] = field(default_factory=dict)
    _made: dict[str, Tensor] = field(default_factory=dict)

    def trained_content(self, key: str, content: Content) -> Blocks:
        """What the tensor `key`, which held `content`, holds after training; all of the group are made at once."""
        self.contents[key] = content

        def compute() -> list[Tensor]:
            if key not in self._made:
                self._made = self._make()
            return [self._made.pop(key)]  # kept until all are written

        return lambda: iter(compute())

    def places(self) -> dict[str, Tensor]:
        """By parameter, the numbers of its elements in the tensors on disk, one after another.

        Raises:
            SvlError: if they are not just arranged in another way.
        """
        numbers, total = {}, 0
        for key in self.keys:
            stored = self.dense.stored[key]
            size = int(torch.Size(stored.shape).numel())
            numbers[key] = torch.arange(total, total + size, dtype=torch.float64).reshape(stored.shape)
            total += size
        model = self.dense.model
        empty = {name: model.get_parameter(name) for name in self.targets}
        try:
            for name, parameter in empty.items():  # what is loaded takes the dtype that is there
                set_tensor(model, name, nn.Parameter(parameter.double(), requires_grad=False))
            problems = fill_model(model, numbers, "cpu", torch.float64)
            found = {name: model.get_parameter(name).detach() for name in self.targets}
        finally:
            for name, parameter in empty.items():
                set_tensor(model, name, parameter)
        if not problems and not any(p.is_meta for p in found.values()):
            found = {name: place.long() for name, place in found.items()}
            count = torch.cat([place.flatten() for place in found.values()]).bincount(minlength=total)
            if bool((count == 1).all()):
                return found
        raise SvlError(
            f"'{next(iter(self.trained))}', which recovery has trained, is stored in another layout in "
            f"'{self.dense.folder}', which is not known"
        )

    def _make(self) -> dict[str, Tensor]:
        """The tensors on disk after training, in their own dtype."""
        parts = [read_content(self.contents[key]) for key in self.keys]
        flat = torch.cat([part.flatten() for part in parts])
        for name, place in self.places().items():
            if name in self.trained:
                flat[place.flatten()] = change_tensor(flat[place], self.trained[name]).flatten()
        pieces = flat.split([part.numel() for part in parts])
        return {key: piece.reshape(part.shape) for key, piece, part in zip(self.keys, pieces, parts, strict=True)}


def converted_groups(dense: Skeleton, trained: Mapping[str, TensorChange]) -> dict[str, ConvertedGroup]:
    """The groups of which something was trained, by the names on disk of all of their tensors.

    Raises:
        SvlError: if how one is converted is not known.
    """
    keys: dict[str, list[str]] = defaultdict(list)
    targets: dict[str, tuple[str, ...]] = {}
    for key, place in dense.places.items():
        if place.converter:
            patterns = place.converter.target_patterns
            keys[place.name].append(key)
            targets[place.name] = tuple(dict.fromkeys(place.name.replace(patterns[0], to) for to in patterns))
    found: dict[str, ConvertedGroup] = {}
    known = set()
    for first, names in keys.items():
        changes = {name: trained[name] for name in targets[first] if name in trained}
        if not changes:
            continue
        group = ConvertedGroup(dense, tuple(names), targets[first], changes)
        shapes = tuple(dense.stored[key].shape for key in names)
        kind = (tuple(dense.places[names[0]].converter.operations), shapes)  # type: ignore[union-attr]
        if kind not in known:  # one of each is tried out before anything is written
            group.places()
            known.add(kind)
        found |= dict.fromkeys(names, group)
    return found


def read_content(content: Content) -> Tensor:
    """A tensor as a whole."""
    return content.read() if isinstance(content, StoredTensor) else torch.cat(list(content()))
