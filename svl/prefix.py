"""What pruned models of one dense model have in common is computed once, when they read the same inputs.

All of them share the vision tower, and each starts with some of the dense model's layers, unchanged. Of models that
take turns on a batch, one records what these make of it, and the next plays that back: answers stay the same to the
last bit. Only the first pass over a batch (of a prompt) is shared; what is generated then differs.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import Cache
from transformers.utils import ModelOutput

from svl.core import SvlError
from svl.loading import NOT_DECODER, Lvlm

Identity = tuple[Any, ...]  # of a module: its tensors in memory


class SharedPrefix:
    """Models, best visited in the given `order`, on one batch after another.

        shared = SharedPrefix(models)
        for batch in batches:
            shared.forget()
            for k in shared.order:
                with shared.turn(k):
                    models[k].model(**batch)

    `saved` counts layer passes that were played back, `passes` all of them.
    """

    def __init__(self, models: Sequence[Lvlm]):
        self.models = models
        self.stacks = [[_identity(layer) for layer in m.layers] for m in models]
        seen: dict[Identity, int] = {}
        for identity in (i for stack in self.stacks for i in stack):
            seen.setdefault(identity, len(seen))
        # neighbours have most in common if sorted like words
        self.order = sorted(range(len(models)), key=lambda k: [seen[i] for i in self.stacks[k]])
        self.saved = self.passes = 0
        self.forget()

    def forget(self) -> None:
        """Drop what was recorded: another batch comes."""
        self._path: list[Identity] = []  # the layers whose outputs are recorded
        self._layers: list[tuple[Any, Any]] = []  # of each: output, and its part of the key-value cache
        self._towers: dict[Identity, list[Any]] = {}  # outputs of the vision tower, call by call

    @contextmanager
    def turn(self, k: int) -> Iterator[None]:
        """Model `k` reads the batch, in the first call of its layers in this context.

        Raises:
            SvlError: there, if its layers do more than can be played back.
        """
        place = self.order.index(k)
        following = self.stacks[self.order[place + 1]] if place + 1 < len(self.order) else []
        known, wanted = _common(self._path, self.stacks[k]), _common(self.stacks[k], following)
        del self._layers[known:]
        self.saved, self.passes = self.saved + known, self.passes + len(self.stacks[k])
        restore = [_play(m, self._towers.setdefault(_identity(m), [])) for m in _towers(self.models[k])]
        for i, layer in enumerate(self.models[k].layers):
            if i < known:
                restore.append(_once(layer, self._back(i)))
            elif i < wanted:
                restore.append(_once(layer, self._record(i, layer.forward)))
        try:
            yield
        finally:
            for undo in restore:
                undo()
            self._path = self.stacks[k][: len(self._layers)]

    def _record(self, i: int, forward: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            output, cache = forward(*args, **kwargs), self._cache(i, args, kwargs)
            self._layers.append((output, copy.deepcopy(cache.layers[i]) if cache else None))
            return output

        return recorded

    def _back(self, i: int) -> Any:
        def played(*args: Any, **kwargs: Any) -> Any:
            (output, part), cache = self._layers[i], self._cache(i, args, kwargs)
            if cache:
                cache.layers[i : i + 1] = [copy.deepcopy(part)]
            return output

        return played

    def _cache(self, i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
        """The cache that layer `i` was called with, if it keeps one."""
        caches = [x for x in (*args, *kwargs.values()) if isinstance(x, Cache)]
        hidden = kwargs.get("use_cache") and not caches
        if hidden or any(isinstance(x, MutableMapping) for x in (*args, *kwargs.values())):
            raise SvlError(
                f"layers of '{self.models[0].name}' leave more behind than their output and their part of a cache"
            )
        return caches[0] if caches else None


def _identity(module: nn.Module) -> Identity:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return (type(module), *((name, t.data_ptr(), t.shape, t.stride()) for name, t in tensors))


def _towers(lvlm: Lvlm) -> list[nn.Module]:
    """The outermost modules that read images: what they compute depends on the batch alone."""
    found: dict[str, nn.Module] = {}
    for name, module in lvlm.model.named_modules():
        apart = any(word in name.rpartition(".")[2] for word in NOT_DECODER)
        holds = f"{lvlm.anatomy.layers}.".startswith(f"{name}.") or name.startswith(f"{lvlm.anatomy.layers}.")
        if apart and not holds and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return list(found.values())


def _common(first: Sequence[Identity], second: Sequence[Identity]) -> int:
    """How many of the first items are equal."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _once(module: nn.Module, forward: Any) -> Any:
    """Let the next call of `module` be `forward`; returns what takes this back."""

    def called(*args: Any, **kwargs: Any) -> Any:
        undo()
        return forward(*args, **kwargs)

    undo = _swap(module, called)
    return undo


def _play(module: nn.Module, outputs: list[Any]) -> Any:
    """Let calls of `module` give `outputs`, one after the other, then compute and record; returns what undoes this."""
    original, calls = module.forward, itertools.count()

    def called(*args: Any, **kwargs: Any) -> Any:
        n = next(calls)
        if n == len(outputs):
            outputs.append(original(*args, **kwargs))
        # callers may write into an output's fields, as Qwen's do
        return copy.copy(outputs[n]) if isinstance(outputs[n], ModelOutput) else outputs[n]

    return _swap(module, called)


def _swap(module: nn.Module, forward: Any) -> Any:
    """Give `module` another `forward`; returns what takes this back."""
    before = module.__dict__.get("forward")
    module.forward = forward

    def undo() -> None:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = before

    return undo
