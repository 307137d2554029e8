"""Checkpoints on disk: to make them, to load them, to compare them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch

from svl.checkpoints import safetensors_files
from svl.core import Patch, Plan, Update
from svl.models import anatomy, loading
from svl.models.lvlm import Lvlm
from svl.pruning import surgery


def digests(folder: Path) -> dict[str, str]:
    """Content of every file of a folder."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def loaded(folder: Path) -> Lvlm:
    """A checkpoint in memory, as it comes; no processor."""
    _, auto = loading.read_model_config(folder)
    model = auto.from_pretrained(folder)
    return Lvlm(model.eval(), None, anatomy.find_anatomy(model), folder.name)


def some_plan(lvlm: Lvlm) -> Plan:
    """Without layers 1, 3 and 4, except protected ones."""
    return Plan(lvlm.anatomy.n_layers, tuple(i for i in (1, 3, 4) if i in lvlm.anatomy.removable))


def some_patch(lvlm: Lvlm, plan: Plan, seed: int = 3) -> Patch:
    """Every part of an update that every writer of every kept layer can take; a product of full rank in one."""
    chance = torch.Generator().manual_seed(seed)
    d = lvlm.anatomy.hidden_size
    updates = {}
    for layer in plan.kept:
        for role, writers in lvlm.anatomy.writers.items():
            writer = writers[layer]
            update = Update(torch.randn(d, 2, generator=chance) / 6, torch.randn(2, d, generator=chance) / 6)
            if layer == plan.kept[-1]:
                update = Update(left=torch.randn(d, d, generator=chance) / 9)
            if writer.single:
                n_in = lvlm.layers[layer].get_submodule(writer.module).weight.shape[1]
                update = replace(update, delta=torch.randn(d, n_in, generator=chance) / 6)
            if writer.single and writer.biases:
                update = replace(update, shift=torch.randn(d, generator=chance))
            if role == "mlp":
                update = replace(update, scale=0.7)
            updates[layer, role] = update
    return Patch(updates)


def in_memory(lvlm: Lvlm, plan: Plan, patch: Patch | None, folder: Path) -> Path:
    surgery.apply(lvlm, plan, patch).model.save_pretrained(folder)
    return folder


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    """Same tensors (names, types, shapes, bits) and the same config."""
    a, b = safetensors_files.read_tensors(ours), safetensors_files.read_tensors(theirs)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(a[name].read(), b[name].read()), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    configs[0].pop("layer_pruning")
    assert configs[0] == configs[1]
