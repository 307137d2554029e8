"""Patches as safetensors files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from svl.core.errors import SvlError, explained
from svl.core.patch import JoinedPart, Patch, Update

PARTS = ("left", "right", "delta", "shift")
INDICES = ("channels", "queries", "groups")  # of a joined part, `<layer>.join<number>.<which>`


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
    joins: dict[int, list[tuple[int, float, float]]] = {}
    for layer, joined in patch.joins.items():
        joins[layer] = [(part.layer, part.norm, part.share) for part in joined]
        tensors |= {f"{layer}.join{n}.{i}": getattr(p, i).clone() for n, p in enumerate(joined) for i in INDICES}
    save_file(tensors, file, {"blends": json.dumps(patch.blends), "joins": json.dumps(joins)})


def load_patch(file: Path) -> Patch:
    """Read what `save_patch` wrote; whether it fits a model, `folding.check_patch` tells.

    Raises:
        SvlError: if it is no such file.
    """
    parts: dict[tuple[int, str], dict[str, Any]] = {}
    maps: dict[int, torch.Tensor] = {}
    with explained(f"'{file}' is not a patch"), safe_open(file, "pt") as source:
        for name in source.keys():  # noqa: SIM118 (not a dict)
            if at := re.fullmatch(r"([0-9]{1,9})\.map", name):
                maps[int(at[1])] = source.get_tensor(name)
                continue
            if re.fullmatch(rf"[0-9]{{1,9}}\.join[0-9]{{1,9}}\.({'|'.join(INDICES)})", name):
                continue
            found = re.fullmatch(r"([0-9]{1,9})\.(\w+)\.(\w+)", name)
            if not found or found[3] not in (*PARTS, "scale"):
                raise SvlError(f"'{file}' is not a patch: '{name}' is not named <layer>.<writer>.<part of an update>")
            tensor = source.get_tensor(name)
            parts.setdefault((int(found[1]), found[2]), {})[found[3]] = tensor.item() if found[3] == "scale" else tensor
        blends = json.loads((source.metadata() or {}).get("blends", "{}"))
        joins = {
            int(layer): tuple(
                JoinedPart(
                    int(k), float(norm), float(share), *(source.get_tensor(f"{layer}.join{n}.{i}") for i in INDICES)
                )
                for n, (k, norm, share) in enumerate(joined)
            )
            for layer, joined in json.loads((source.metadata() or {}).get("joins", "{}")).items()
        }
        updates = {key: Update(**parts[key]) for key in sorted(parts)}
        return Patch(updates, _numbered(blends), {start: maps[start] for start in sorted(maps)}, joins=joins)


def _numbered(blends: dict[str, dict[str, Any]]) -> dict[int, dict[int, float]]:
    """The blends of a patch from JSON, which has texts as keys."""
    return {int(layer): {int(k): float(c) for k, c in terms.items()} for layer, terms in blends.items()}
