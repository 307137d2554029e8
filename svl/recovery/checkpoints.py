"""Checkpoints of a training: which are whole, and whether they are of this training or of another one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from svl.core import SvlError
from svl.core.contract import method_name
from svl.core.errors import reason_of
from svl.data.samples import Samples
from svl.models.lvlm import Lvlm
from svl.recovery.student import Student

log = logging.getLogger(__name__)
SAVED, PROGRESS = "step-", "progress.json"  # a whole checkpoint, and what of it the Trainer does not keep
RANDOM = "rng_state.pth"  # under the name that the Trainer looks for
CHECKPOINT_FILES = (
    *("model.safetensors", "optimizer.pt", "scheduler.pt", RANDOM, "trainer_state.json"),
    PROGRESS,
)


def training_record(dense: Lvlm, student: Student, samples: Samples) -> dict[str, str]:
    """What a training depends on, as hashes by what a reader would look for, cause before effect.

    `student` is not trained yet. Of weights (the dense model's, and those that a patch has changed), it is
    sums of bit patterns: exact on any device.
    """
    plan, recovery = student.plan, student.recovery
    settings = {f.name: getattr(recovery, f.name) for f in dataclasses.fields(recovery)}
    given = dict(dense.model.named_parameters())
    shared = {parameter.data_ptr() for parameter in given.values()}
    adapters = student.trained.keys() - set(student.parts.tensors)  # drawn at random, on whatever device
    patched = dict(student.model.named_parameters())
    patched = {name: p for name, p in patched.items() if p.data_ptr() not in shared and name not in adapters}
    return {
        "layers": _digest([plan.n_layers, plan.removed, plan.sublayers]),
        "samples": _digest([samples.fingerprint, samples.answers]),
        "settings": _digest(
            [
                method_name(recovery),
                {name: value for name, value in settings.items() if name not in recovery.unrelated},
                *(dataclasses.asdict(part) for part in (student.parts, recovery.losses, recovery.adapter)),
            ]
        ),
        "weights": _digest([{name: _bits(p) for name, p in weights.items()} for weights in (given, patched)]),
    }


def check_same_training(checkpoint: Path, record: dict[str, str]) -> None:
    """Raise SvlError if a checkpoint is of a training that depends on something else than `record` says."""
    found = json.loads((checkpoint / PROGRESS).read_text()).get("training", {})
    for name, value in record.items():
        if found.get(name) != value:
            raise SvlError(
                f"'{checkpoint.parent}' has the checkpoint {checkpoint.name} of a training with other {name}: give "
                "another folder, or remove the checkpoint"
            )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _bits(tensor: Tensor) -> list[Any]:
    """Dtype, shape, and the sum of its numbers' bit patterns as integers, which knows no rounding."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = tensor.detach().contiguous().view(integers).sum(dtype=torch.int64)
    return [str(tensor.dtype), list(tensor.shape), int(total)]


def remove_damaged(folder: Path) -> None:
    """Remove checkpoints that cannot be read, with a warning: training then begins anew."""
    for checkpoint in folder.glob(f"{SAVED}*"):
        if damage := _damage(checkpoint):
            log.warning("  recover: the checkpoint %s is damaged (%s), and is removed", checkpoint.name, damage)
            shutil.rmtree(checkpoint)


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if all its files are there, and whole."""
    for name in CHECKPOINT_FILES:
        path = checkpoint / name
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # its header says how long it must be
                    pass
            else:
                with zipfile.ZipFile(path) as archive:  # as torch writes
                    if damaged := archive.testzip():
                        return f"{name}: {damaged}"
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{name}: {reason_of(error)}"
    return None
