"""Patches, and what recovery has trained, as safetensors files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from svl.core.errors import SvlError, explained
from svl.core.patch import JoinedPart, Patch, TensorChange, Update

PARTS = ("left", "right", "delta", "shift", "weight")
INDICES = ("channels", "queries", "groups")  # of a joined part, `<layer>.join<number>.<which>`
TRAINED = ("value", "left", "right")
TERMS = "terms"  # of a joined part, likewise: its layer, norm and share, fp64 [3]


def save_patch(patch: Patch, file: Path) -> None:
    """Write a patch as safetensors: `<layer>.<writer>.<part>` of updates, `<layer>.map`; blends are in the metadata.

    A scale is stored in fp64, as a tensor without dimensions.
    """
    tensors = {}
    for (layer, role), update in patch.updates.items():
        for part in PARTS:
            if (tensor := getattr(update, part)) is not None:
                tensors[f"{layer}.{role}.{part}"] = tensor.cpu().clone().contiguous()
        if update.scale is not None:
            tensors[f"{layer}.{role}.scale"] = torch.tensor(update.scale, dtype=torch.float64)
    tensors |= {f"{start}.map": matrix.cpu().clone().contiguous() for start, matrix in patch.maps.items()}
    for layer, joined in patch.joins.items():
        for n, source in enumerate(joined):
            tensors |= {f"{layer}.join{n}.{which}": getattr(source, which).clone() for which in INDICES}
            terms = [source.layer, source.norm, source.share]
            tensors[f"{layer}.join{n}.{TERMS}"] = torch.tensor(terms, dtype=torch.float64)
    # One entry of metadata: several would come in any order, and a patch must have one hash.
    save_file(tensors, file, {"blends": json.dumps(patch.blends)})


def load_patch(file: Path) -> Patch:
    """Read what `save_patch` wrote; whether it fits a model, `folding.check_patch_for_model` tells.

    Raises:
        SvlError: if it is no such file.
    """
    parts: dict[tuple[int, str], dict[str, Any]] = {}
    maps: dict[int, torch.Tensor] = {}
    joined: dict[int, dict[int, dict[str, torch.Tensor]]] = {}
    with explained(f"'{file}' is not a patch"), safe_open(file, "pt") as source:
        for name in source.keys():  # noqa: SIM118 (not a dict)
            if at := re.fullmatch(r"([0-9]{1,9})\.map", name):
                maps[int(at[1])] = source.get_tensor(name)
                continue
            if at := re.fullmatch(rf"([0-9]{{1,9}})\.join([0-9]{{1,9}})\.({'|'.join((*INDICES, TERMS))})", name):
                joined.setdefault(int(at[1]), {}).setdefault(int(at[2]), {})[at[3]] = source.get_tensor(name)
                continue
            found = re.fullmatch(r"([0-9]{1,9})\.(\w+)\.(\w+)", name)
            if not found or found[3] not in (*PARTS, "scale"):
                raise SvlError(f"'{file}' is not a patch: '{name}' is not named <layer>.<writer>.<part of an update>")
            tensor = source.get_tensor(name)
            parts.setdefault((int(found[1]), found[2]), {})[found[3]] = tensor.item() if found[3] == "scale" else tensor
        blends = json.loads((source.metadata() or {}).get("blends", "{}"))
        joins = {
            layer: tuple(_joined_part(joined[layer][n]) for n in sorted(joined[layer])) for layer in sorted(joined)
        }
        updates = {key: Update(**parts[key]) for key in sorted(parts)}
        return Patch(updates, _numbered(blends), {start: maps[start] for start in sorted(maps)}, joins=joins)


def _numbered(blends: dict[str, dict[str, Any]]) -> dict[int, dict[int, float]]:
    """The blends of a patch from JSON, which has texts as keys."""
    return {int(layer): {int(k): float(c) for k, c in terms.items()} for layer, terms in blends.items()}


def _joined_part(tensors: dict[str, torch.Tensor]) -> JoinedPart:
    layer, norm, share = tensors[TERMS].tolist()
    return JoinedPart(int(layer), norm, share, *(tensors[which] for which in INDICES))


def save_trained(trained: Mapping[str, TensorChange], file: Path) -> None:
    """Write trained tensors as safetensors: `<name>:<value, left or right>`."""
    tensors = {
        f"{name}:{part}": tensor.detach().cpu().clone().contiguous()
        for name, change in trained.items()
        for part in TRAINED
        if (tensor := getattr(change, part)) is not None
    }
    save_file(tensors, file)


def load_trained(file: Path) -> dict[str, TensorChange]:
    """Read what `save_trained` wrote; whether it fits a model, `trained.check_trained` tells.

    Raises:
        SvlError: if it is no such file.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    with explained(f"'{file}' has no trained tensors"), safe_open(file, "pt") as source:
        for key in source.keys():  # noqa: SIM118 (not a dict)
            name, _, part = key.rpartition(":")
            if part not in TRAINED:
                raise SvlError(f"'{file}' has no trained tensors: '{key}' is not named <name>:<part of a change>")
            parts.setdefault(name, {})[part] = source.get_tensor(key)
        return {name: TensorChange(**parts[name]) for name in sorted(parts)}
