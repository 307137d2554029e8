"""Pruned models of one dense model answer a batch in lock-step: a layer that several of them keep runs once for all.

Every model has rows of its own in one large batch, which a host generates for: a model of the layers that at least one
of them keeps. Each of its layers works on the rows of the models that keep it unchanged, in one call; rows of a model
whose layer has other weights go through that, and rows of models without it pass. So weights are read once for all
models, which is what decoding waits for on an accelerator. In the prompt, rows of models that have had the same layers
so far are the same, and computed once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from svl.core import Plan, SvlError
from svl.evaluation.batch_rows import Rows, RowSelection, map_tensors, repeated, repeats
from svl.evaluation.growing_cache import GrowingLayer
from svl.evaluation.shared_prefill import Forward, cache_of, module_identity, replace_forward, vision_towers
from svl.models.layer_calls import first_argument, first_output, with_first_output
from svl.models.lvlm import Lvlm
from svl.models.positions import looked_up_positions
from svl.pruning.surgery import apply

CHECK_EVERY = 8  # decoded tokens, after which rows that have ended leave: a check waits for the device


@dataclass(frozen=True)
class Group:
    """Models whose rows go through one module at a layer of the host.

    Attributes:
        forward: of the module.
        members: numbers of the models.
        leads: of these, the first of each history (the modules that rows have been through before).
        lead_of: for each member, the place of the one with its history among `leads`.
    """

    forward: Forward
    members: tuple[int, ...]
    leads: tuple[int, ...]
    lead_of: tuple[int, ...]


@dataclass
class Slot:
    """What a group keeps of its rows: a layer of a cache, and a cache that holds nothing else."""

    layer: Any
    view: Cache


@dataclass
class Batch:
    """Where the host is in a batch.

    Attributes:
        size: rows of each model.
        total: rows of all.
        selection: of rows from the arguments of this pass.
        passes: through the host; in the first one models read the same.
        ended: which rows have ended their answers, None if no token ends them.
        left: rows that have ended, and left.
        rows: of each group that has been called (by layer and number), the rows that it now has.
        slots: of each such group.
    """

    size: int
    total: int
    selection: RowSelection
    passes: int = 0
    ended: Tensor | None = None
    left: frozenset[int] = frozenset()
    rows: dict[tuple[int, int], Rows] = field(default_factory=dict)
    slots: dict[tuple[int, int], Slot] = field(default_factory=dict)
    same: dict[tuple[int, ...], Rows] = field(default_factory=dict)

    def interned(self, numbers: Sequence[int]) -> Rows:
        """Rows of these numbers, one object for all groups that have them."""
        key = tuple(numbers)
        return self.same.setdefault(key, Rows(key, self.total))

    def rows_of(self, models: Sequence[int]) -> Rows:
        """All rows of these models."""
        return self.interned([k * self.size + b for k in models for b in range(self.size)])


class LockStep:
    """Models without layers of one dense model, which answer together.

        lock_step = LockStep(dense, models, plans)
        tokens = lock_step.generate(inputs, dense.model.generation_config)  # of every model, as alone

    The dense model may be one of them, with a plan that removes nothing.

    Args:
        dense: the model that all share unchanged tensors with.
        models: as `svl.apply(dense, plan, patch)` gives them.
        plans: of each, the layers it lacks.

    Raises:
        SvlError: if the models differ in more than their layers.
    """

    def __init__(self, dense: Lvlm, models: Sequence[Lvlm], plans: Sequence[Plan]):
        self.dense, self.models, self.plans = dense, models, plans
        for model, plan in zip(models, plans, strict=True):
            _check(dense, model, plan)
        removed_by_all = set.intersection(*(set(plan.removed) for plan in plans))
        whole = Plan(len(dense.layers), tuple(sorted(removed_by_all)))
        self._host = apply(dense, whole)  # a model of its own, so that its modules may be changed
        self._groups = self._grouped(whole.kept)
        self._batch = Batch(0, 0, RowSelection(0, dense.name))
        for i, layer in enumerate(self._host.layers):
            replace_forward(layer, self._layer_forward(i))
        for tower in vision_towers(self._host):
            replace_forward(tower, self._tower_forward(tower.forward))
        decoder = self._host.model.get_submodule(dense.anatomy.layers.rpartition(".")[0])
        decoder.register_forward_pre_hook(lambda *_: self._start_pass())

    def generate(self, inputs: dict[str, Tensor], settings: GenerationConfig) -> list[Tensor]:
        """Greedy answers of every model, as its own `generate` gives them.

        Args:
            inputs: of one batch, padded on the left.
            settings: of generation, the same for all.

        Returns:
            For each model, ids [rows, tokens of the prompt and the longest of its answers].

        Raises:
            SvlError: if the model's layers keep more than keys and values, or are called with what has unknown rows.
        """
        settings = copy.deepcopy(settings)
        settings.update(cache_implementation="dynamic", return_dict_in_generate=False)
        ends = self._ends(settings)
        tiled = self._start_batch(inputs)
        criteria = StoppingCriteriaList([_Ends(self._batch, ends)] if ends else [])
        try:
            model: Any = self._host.model
            tokens = model.generate(**tiled, generation_config=settings, stopping_criteria=criteria)
        finally:
            self._end_batch()
        prompt = inputs["input_ids"].shape[1]
        return [_as_alone(own, prompt, ends) for own in tokens.chunk(len(self.models))]

    def logits(self, inputs: dict[str, Tensor], last: int) -> Iterator[tuple[int, Tensor]]:
        """The numbers of the models, each with its logits [rows, last, vocabulary] of the last tokens of a batch.

        Raises:
            SvlError: as `generate`.
        """
        tiled = self._start_batch(inputs)
        try:
            tiled |= looked_up_positions(self._host, tiled)
            with torch.inference_mode():
                logits = self._host.model(**tiled, logits_to_keep=last, use_cache=False).logits
        finally:
            self._end_batch()
        yield from enumerate(logits.chunk(len(self.models)))

    # ------------------------------------------------------------------------------------------------ batches

    def _start_batch(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of all rows: the batch once for each model."""
        size, n = len(inputs["input_ids"]), len(self.models)
        self._batch = Batch(size, n * size, RowSelection(n * size, self.dense.name))
        return {name: repeated(value, n) for name, value in inputs.items()}

    def _end_batch(self) -> None:
        self._batch = Batch(0, 0, RowSelection(0, self.dense.name))

    def _start_pass(self) -> None:
        """The host is called: rows that have ended leave now and then."""
        batch = self._batch
        batch.passes += 1
        batch.selection.clear()
        if batch.ended is None or batch.passes % CHECK_EVERY:
            return
        ended = frozenset(i for i, over in enumerate(batch.ended.tolist()) if over)
        if batch.left < ended and len(ended) < batch.total:
            batch.left = ended
            for key, rows in batch.rows.items():
                self._leave(key, rows)

    def _leave(self, key: tuple[int, int], rows: Rows) -> None:
        """Take ended rows from a group; one stays at least, as an empty cache would have no length."""
        staying = [place for place, row in enumerate(rows.numbers) if row not in self._batch.left] or [0]
        if len(staying) == len(rows.numbers):
            return
        self._batch.rows[key] = self._batch.interned([rows.numbers[place] for place in staying])
        layer = self._batch.slots[key].layer if key in self._batch.slots else None
        if layer is not None and layer.is_initialized:  # else its block is left out, and keeps nothing
            layer.batch_select_indices(torch.tensor(staying, device=layer.keys.device))

    def _ends(self, settings: GenerationConfig) -> list[int]:
        """The tokens that end an answer."""
        ends = settings.eos_token_id
        if ends is None:
            ends = self._host.model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    # ------------------------------------------------------------------------------------------------- layers

    def _grouped(self, kept: Sequence[int]) -> list[list[Group]]:
        """For each layer of the host (layers `kept` of the dense model), the groups of models that have it."""
        history = [0] * len(self.models)
        found: list[list[Group]] = []
        for i, old in enumerate(kept):
            having = [k for k, plan in enumerate(self.plans) if old in plan.kept]
            modules = {k: self.models[k].layers[self.plans[k].kept.index(old)] for k in having}
            members: dict[Any, list[int]] = {}
            for k in having:
                members.setdefault(module_identity(modules[k]), []).append(k)
            own = self._host.layers[i]
            found.append([])
            for identity, of_one in members.items():
                first: dict[int, int] = {}
                for k in of_one:
                    first.setdefault(history[k], k)
                leads = tuple(first.values())
                module: nn.Module = own if identity == module_identity(own) else modules[of_one[0]]
                lead_of = tuple(leads.index(first[history[k]]) for k in of_one)
                forward = own.forward if module is own else module  # the host's will be replaced; others have hooks
                found[-1].append(Group(forward, tuple(of_one), leads, lead_of))
            history = _continued(history, found[-1])
        return found

    def _layer_forward(self, i: int) -> Forward:
        """What layer `i` of the host does."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            cache = cache_of(self.dense.name, args, kwargs)
            hidden = first_argument(args, kwargs)
            if len(hidden) != self._batch.total:
                raise SvlError(f"layers of '{self.dense.name}' are called with hidden states of unknown rows")
            slots = self._slots(i, cache) if cache else [None] * len(self._groups[i])
            result: Any = hidden
            for g, group in enumerate(self._groups[i]):
                output = self._call(i, g, slots[g], args, kwargs)
                whole = len(group.members) == len(self.models) and not self._batch.left
                result = self._merged(result, output, None if whole else self._batch.rows[i, g], result is hidden)
            return result

        return forward

    def _call(self, i: int, g: int, slot: Slot | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a group makes of its rows."""
        batch, group = self._batch, self._groups[i][g]
        first = batch.passes == 1
        if first:
            batch.rows[i, g] = batch.rows_of(group.members)
        rows = batch.rows_of(group.leads) if first else batch.rows[i, g]

        def selected(name: str, value: Any) -> Any:
            return slot.view if slot and isinstance(value, Cache) else batch.selection.of(name, value, rows)

        given = [selected("hidden_states" if n == 0 else "", value) for n, value in enumerate(args)]
        output = group.forward(*given, **{name: selected(name, value) for name, value in kwargs.items()})
        if not first or len(group.leads) == len(group.members):
            return output
        places = [place * batch.size + b for place in group.lead_of for b in range(batch.size)]
        if slot:
            slot.layer.batch_select_indices(torch.tensor(places, device=slot.layer.keys.device))
        return map_tensors(output, lambda t: t.index_select(0, torch.tensor(places, device=t.device)))

    def _merged(self, before: Any, output: Any, rows: Rows | None, first: bool) -> Any:
        """`before` with the `output` of a group (hidden states, or a tuple that they come first in) in its rows."""
        if rows is None:
            return output
        states, whole = first_output(output), first_output(before)
        whole = whole.to(states.device, copy=True) if first else whole
        whole.index_copy_(0, rows.index(states.device), states)
        return with_first_output(output, whole)

    def _slots(self, i: int, cache: Cache) -> list[Slot | None]:
        """Of the groups of a layer; the first one has the host's own, which tells masks how long the past is."""
        slots, groups = self._batch.slots, self._groups[i]
        if (i, 0) not in slots:
            layer: Any = cache.layers[i] if i < len(cache.layers) else None
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise SvlError(f"layers of '{self.dense.name}' keep more than keys and values ({layer!r})")
            layers = [GrowingLayer() if type(layer) is DynamicLayer else copy.deepcopy(layer) for _ in groups]
            cache.layers[i] = layers[0]
            for g, own in enumerate(layers):
                view = copy.copy(cache)
                view.layers = [own] * len(cache.layers)  # whatever number the module has
                slots[i, g] = Slot(own, view)
        return [slots[i, g] for g in range(len(groups))]

    # ------------------------------------------------------------------------------------------------- towers

    def _tower_forward(self, original: Forward) -> Forward:
        """What a vision tower of the host does: it reads the images once, and gives what it makes of them to all."""
        times = len(self.models)
        axes: list[int | None] = []

        def forward(*args: Any, **kwargs: Any) -> Any:
            tensors: list[Tensor] = []
            map_tensors([args, kwargs], tensors.append)
            if times == 1 or not tensors or not all(repeats(t, times) for t in tensors):
                return original(*args, **kwargs)

            def of_models(n: int) -> Any:
                parts = map_tensors([args, kwargs], lambda t: t[: len(t) // times * n])
                return original(*parts[0], **parts[1])

            once = of_models(1)
            if not axes:  # found out by reading everything twice
                axes.extend(_growing_axes(once, of_models(2)))
            axis = iter(axes)
            return map_tensors(once, lambda t: t if (a := next(axis)) is None else repeated(t, times, a))

        return forward


class _Ends(StoppingCriteria):
    """Notes which rows of a batch have ended; stops nothing."""

    def __init__(self, batch: Batch, ends: list[int]):
        self.batch, self.ends = batch, torch.tensor(ends)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        last = input_ids[:, -1]
        self.ends = self.ends.to(last.device)
        over = torch.isin(last, self.ends)
        self.batch.ended = over if self.batch.ended is None else self.batch.ended | over
        return torch.zeros_like(over)


def _check(dense: Lvlm, model: Lvlm, plan: Plan) -> None:
    """Raise SvlError unless `model` is `dense` with the layers of `plan`, as far as all but their weights go."""
    dense.anatomy.check_plan(plan, dense.name, protect=False)
    if len(model.layers) != len(plan.kept):
        raise SvlError(f"'{model.name}' has {len(model.layers)} layers, but its plan keeps {len(plan.kept)}")
    if waived := sorted(set(plan.removed) & set(dense.anatomy.waived)):
        raise SvlError(f"other layers of '{dense.name}' depend on layers {waived}, which a plan removes")
    if _beside_layers(model) != _beside_layers(dense):
        raise SvlError(f"'{model.name}' and the dense model differ in more than their layers")


def _beside_layers(lvlm: Lvlm) -> dict[str, Any]:
    """Where the parameters of a model are that belong to no decoder layer."""
    named = lvlm.model.named_parameters()
    return {name: p.data_ptr() for name, p in named if not name.startswith(f"{lvlm.anatomy.layers}.")}


def _continued(history: Sequence[int], groups: Sequence[Group]) -> list[int]:
    """The histories of models after a layer with these groups: equal for those that were equal and stay together."""
    group_of = {k: g for g, group in enumerate(groups) for k in group.members}
    seen: dict[tuple[int, int | None], int] = {}
    return [seen.setdefault((before, group_of.get(k)), len(seen)) for k, before in enumerate(history)]


def _as_alone(tokens: Tensor, prompt: int, ends: list[int]) -> Tensor:
    """A model's ids without what was added while others went on."""
    over = torch.isin(tokens[:, prompt:], torch.tensor(ends, device=tokens.device)).int()
    lengths = torch.where(over.any(1), over.argmax(1) + 1, over.shape[1])
    return tokens[:, : prompt + int(lengths.max())]


def _growing_axes(once: Any, twice: Any) -> list[int | None]:
    """For every tensor of an output, the axis along which it is twice as long for twice the input."""
    small: list[Tensor] = []
    large: list[Tensor] = []
    map_tensors(once, small.append)
    map_tensors(twice, large.append)
    pairs = [zip(a.shape, b.shape, strict=True) for a, b in zip(small, large, strict=True)]
    return [next((axis for axis, (a, b) in enumerate(sizes) if b == 2 * a), None) for sizes in pairs]
