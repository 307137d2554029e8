"""What pruned models of one dense model have in common is computed once, when they read the same inputs.

All of them share the vision tower, and each starts with some of the dense model's layers, unchanged. Of models that
read a batch one after the other, one records what these make of it, and the next takes the recorded outputs: answers
stay the same to the last bit. Only the first pass over a batch (of a prompt) is shared; what is generated then differs.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig
from transformers.utils import ModelOutput

from svl.core import SvlError
from svl.models.anatomy import NOT_DECODER
from svl.models.lvlm import Lvlm
from svl.models.placement import tensor_identities
from svl.models.positions import looked_up_positions

Identity = tuple[Any, ...]  # of a module: its class and its tensors in memory
Forward = Callable[..., Any]
Undo = Callable[[], None]


class RecordedLayer(NamedTuple):
    """What a decoder layer made of the batch."""

    output: Any
    cache: Any  # its layer of the key-value cache, None without a cache


class SharedPrefill:
    """Models that read one batch after another, best in the given `order`.

    `generate` and `logits` do so, as those of svl.evaluation.lock_step.LockStep; what else is wanted of them:

        shared = SharedPrefill(models)
        for batch in batches:
            shared.start_batch()
            for k in shared.order:
                with shared.reading(k):
                    models[k].model(**batch)

    `layers_saved` counts passes through a layer that were not computed, `layers_passed` all of them.
    """

    def __init__(self, models: Sequence[Lvlm]):
        self.models = models
        self.stacks = [[module_identity(layer) for layer in m.layers] for m in models]
        seen: dict[Identity, int] = {}
        for identity in itertools.chain.from_iterable(self.stacks):
            seen.setdefault(identity, len(seen))
        # neighbours have most in common if sorted like words
        self.order = sorted(range(len(models)), key=lambda k: [seen[i] for i in self.stacks[k]])
        self.layers_saved = self.layers_passed = 0
        self.start_batch()

    def start_batch(self) -> None:
        """Forget what was recorded: another batch comes, or none."""
        self._recorded_stack: list[Identity] = []  # the first layers of the last model, whose outputs are recorded
        self._recorded: list[RecordedLayer] = []
        self._towers: dict[Identity, list[Any]] = {}  # outputs of the vision tower, call by call

    def generate(self, inputs: dict[str, Tensor], settings: GenerationConfig) -> list[Tensor]:
        """What `generate` of every model gives for a batch: ids [rows, tokens of the prompt and the longest answer].

        Raises:
            SvlError: if layers do more than can be recorded.
        """
        tokens: dict[int, Tensor] = {}
        self.start_batch()
        for k in self.order:
            model: Any = self.models[k].model
            with self.reading(k):
                tokens[k] = model.generate(**inputs, generation_config=settings)
        self.start_batch()
        return [tokens[k] for k in range(len(self.models))]

    def logits(self, inputs: dict[str, Tensor], last: int) -> Iterator[tuple[int, Tensor]]:
        """The numbers of the models, each with its logits [rows, last, vocabulary] of the last tokens of a batch.

        Raises:
            SvlError: if layers do more than can be recorded.
        """
        self.start_batch()
        for k in self.order:
            given = {**inputs, **looked_up_positions(self.models[k], inputs)}
            with self.reading(k), torch.inference_mode():
                logits = self.models[k].model(**given, logits_to_keep=last, use_cache=False).logits
            yield k, logits
        self.start_batch()

    @contextmanager
    def reading(self, k: int) -> Iterator[None]:
        """Within the block, the first call of the layers of model `k` reads the batch.

        Raises:
            SvlError: at that call, if its layers do more than can be recorded.
        """
        position = self.order.index(k)
        last = position + 1 == len(self.order)
        known = _common_start(self._recorded_stack, self.stacks[k])
        wanted = 0 if last else _common_start(self.stacks[k], self.stacks[self.order[position + 1]])
        del self._recorded[known:]
        self.layers_saved += known
        self.layers_passed += len(self.stacks[k])
        undo = [self._share_tower(tower) for tower in vision_towers(self.models[k])]
        for i, layer in enumerate(self.models[k].layers):
            if i < known:
                undo.append(_replace_next_call(layer, self._recorded_forward(i)))
            elif i < wanted:
                undo.append(_replace_next_call(layer, self._recording_forward(i, layer.forward)))
        try:
            yield
        finally:
            for take_back in undo:
                take_back()
            self._recorded_stack = self.stacks[k][: len(self._recorded)]

    def _recording_forward(self, i: int, forward: Forward) -> Forward:
        """Layer `i` computes, and its output is kept."""

        def recording(*args: Any, **kwargs: Any) -> Any:
            output, cache = forward(*args, **kwargs), cache_of(self.models[0].name, args, kwargs)
            self._recorded.append(RecordedLayer(output, copy.deepcopy(cache.layers[i]) if cache else None))
            return output

        return recording

    def _recorded_forward(self, i: int) -> Forward:
        """Layer `i` gives what was kept, in its output and in the cache."""

        def recorded(*args: Any, **kwargs: Any) -> Any:
            cache = cache_of(self.models[0].name, args, kwargs)
            if cache:
                cache.layers[i : i + 1] = [copy.deepcopy(self._recorded[i].cache)]
            return self._recorded[i].output

        return recorded

    def _share_tower(self, tower: nn.Module) -> Undo:
        """Calls of a tower give the recorded outputs, one after the other, then compute and record more."""
        original, outputs, calls = tower.forward, self._towers.setdefault(module_identity(tower), []), itertools.count()

        def shared(*args: Any, **kwargs: Any) -> Any:
            n = next(calls)
            if n == len(outputs):
                outputs.append(original(*args, **kwargs))
            # callers may write into an output's fields, as Qwen's do
            return copy.copy(outputs[n]) if isinstance(outputs[n], ModelOutput) else outputs[n]

        return replace_forward(tower, shared)


def cache_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The cache that a decoder layer of the model `name` was called with, if it keeps one.

    Raises:
        SvlError: if layers leave something behind elsewhere, so that what they do cannot be shared.
    """
    values = (*args, *kwargs.values())
    caches = [x for x in values if isinstance(x, Cache)]
    hidden = kwargs.get("use_cache") and not caches
    if hidden or any(isinstance(x, MutableMapping) for x in values):
        raise SvlError(f"layers of '{name}' leave more behind than their output and their part of a cache")
    return caches[0] if caches else None


def module_identity(module: nn.Module) -> Identity:
    """Equal for modules of one class that share all tensors."""
    return (type(module), *tensor_identities(module))


def vision_towers(lvlm: Lvlm) -> list[nn.Module]:
    """The outermost modules that read images: what they compute depends on the batch alone."""
    found: dict[str, nn.Module] = {}
    decoder = lvlm.anatomy.layers
    for name, module in lvlm.model.named_modules():
        apart = any(word in name.rpartition(".")[2] for word in NOT_DECODER)
        holds_decoder = f"{decoder}.".startswith(f"{name}.") or name.startswith(f"{decoder}.")
        if apart and not holds_decoder and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return list(found.values())


def _common_start(first: Sequence[Identity], second: Sequence[Identity]) -> int:
    """How many of the first items are equal."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _replace_next_call(module: nn.Module, forward: Forward) -> Undo:
    """Let the next call of `module` be `forward`, and later ones its own; returns what takes this back."""

    def once(*args: Any, **kwargs: Any) -> Any:
        undo()
        return forward(*args, **kwargs)

    undo = replace_forward(module, once)
    return undo


def replace_forward(module: nn.Module, forward: Forward) -> Undo:
    """Give `module` another `forward`; returns what takes this back."""
    before = module.__dict__.get("forward")
    module.forward = forward

    def undo() -> None:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = before

    return undo
