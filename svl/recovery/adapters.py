"""The one seam to peft: adapters of low rank on linear modules, and what they add to weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from svl.core.errors import explained
from svl.models.lvlm import Lvlm
from svl.recovery.base import Adapter

NAME = "recovery"  # of the adapter, which peft keeps by names


def add_adapters(lvlm: Lvlm, paths: Collection[str], settings: Adapter) -> list[nn.Parameter]:
    """Put adapters, which change nothing yet, beside linear modules of a model; their parameters, in fp32.

    All other parameters are left without gradients.

    Raises:
        SvlError: if peft takes one of the modules for something else.
    """
    from peft import LoraConfig, inject_adapter_in_model

    chosen = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(paths),
        bias="none",
    )
    with explained(f"LoRA cannot attach to '{lvlm.name}'"):
        inject_adapter_in_model(chosen, lvlm.model, NAME)
    found = []
    for path in paths:
        module: Any = lvlm.model.get_submodule(path)
        for factor in (module.lora_A[NAME], module.lora_B[NAME]):
            factor.weight.data = factor.weight.data.float()
            found.append(factor.weight)
    return found


def added_products(lvlm: Lvlm, paths: Collection[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What the adapters at `paths` add to weights: path, left [d_out, rank] and right [rank, d_in], fp32."""
    for path in paths:
        module: Any = lvlm.model.get_submodule(path)
        right = module.lora_A[NAME].weight.detach()
        left = module.lora_B[NAME].weight.detach() * module.scaling[NAME]
        yield path, left.to(torch.float32), right.to(torch.float32)
