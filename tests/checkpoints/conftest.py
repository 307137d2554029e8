"""Checkpoints of families on disk, and what makes them unfit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import FAMILIES

from svl.models import loading


@pytest.fixture
def family(tmp_path):
    """A family's checkpoint, saved with the options given."""

    def saved(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        FAMILIES[name]().model.save_pretrained(folder)
        if dtype != torch.float32 or options:
            _, auto = loading.read_model_config(folder)
            model = auto.from_pretrained(folder, dtype=dtype)
            shutil.rmtree(folder)
            model.save_pretrained(folder, **options)
        return folder

    return saved
