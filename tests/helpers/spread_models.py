"""Models spread over devices: maps for them, and what must come out the same wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from helpers.fake_devices import on_cpu
from torch import Tensor

from svl.core import Patch
from svl.models.lvlm import Lvlm


def map_over(lvlm: Lvlm, places: Sequence[str], others: str | None = None) -> dict[str, str]:
    """A device map: layers over `places` in turn, neighbours together; before them the first place, behind the last.

    With `others`, what is no decoder layer goes there.
    """
    layers, n = lvlm.anatomy.layers, lvlm.anatomy.n_layers
    names = [*lvlm.model.state_dict(), *(name for name, _ in lvlm.model.named_buffers())]
    first, last = others or places[0], others or places[-1]
    found = {}
    for name in names:
        module = name.rpartition(".")[0]
        if (i := lvlm.anatomy.layer_number(name)) is not None:
            found[f"{layers}.{i}"] = places[i * len(places) // n]
        else:  # a tensor of a module that the decoder is in is named itself
            behind = module.rpartition(".")[2] in ("norm", "lm_head")
            around = f"{layers}.".startswith(f"{module}." if module else "")
            found[name if around else module] = last if behind else first
    return found


def same(a: Any, b: Any) -> None:
    """Raise AssertionError unless two nested values are equal, bit for bit, wherever they lie."""
    a, b = on_cpu(a), on_cpu(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif hasattr(a, "__dataclass_fields__"):
        same(vars(a), vars(b))
    else:
        assert a == b


def assert_plain(patch: Patch) -> None:
    """Raise AssertionError unless the patch is data on the CPU."""
    for update in patch.updates.values():
        for part in (update.left, update.right, update.delta, update.shift, update.weight):
            assert part is None or type(part) is Tensor
