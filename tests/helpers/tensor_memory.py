"""How much memory the tensors made within a block take at once, counted exactly: of a CPU's, torch keeps no count."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Peak:
    """Bytes of the storages that are alive, and the most there were at once."""

    now: int = 0
    most: int = 0


class _Counting(TorchDispatchMode):
    """Counts each storage from the operation that gives it out to its end; scratch within one operation is not seen."""

    def __init__(self, peak: Peak) -> None:
        super().__init__()
        self.peak = peak
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage(), known)
        return result

    def count(self, storage: Any, known: set[int]) -> None:
        key = storage._cdata
        if key in self.seen or key in known:
            return
        self.seen.add(key)
        size = storage.nbytes()
        self.peak.now += size
        self.peak.most = max(self.peak.most, self.peak.now)
        weakref.finalize(storage, self.release, key, size)

    def release(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.peak.now -= size


@contextmanager
def tensor_memory() -> Iterator[Peak]:
    """Within the block, the peak grows with what is alive of the tensors that the block makes."""
    peak = Peak()
    with _Counting(peak):
        yield peak
