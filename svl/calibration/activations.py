"""Hidden states of the calibration set, streamed for compensations, which need vectors of a few layers only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from svl.calibration.hooks import EnoughError, run_decoder, state_hooks, writer_hook
from svl.calibration.layer_replay import Replay, record_replay
from svl.calibration.row_count import add_rows
from svl.core import LayerRows, Patch, Plan, Stats, SvlError, TokenTrace, Update, checked_weights
from svl.core.errors import out_of_memory
from svl.data.samples import Sample, Samples
from svl.models.devices import fp64_device
from svl.models.lvlm import Lvlm, Progress, no_progress
from svl.models.placement import stored_tensor
from svl.models.sample_inputs import encode_samples, explained_samples
from svl.pruning import folding, layer_trials, sublayers, surgery

_States = dict[int, Tensor]
_Writings = dict[tuple[int, str], Tensor]  # by layer and writer

NO_SAMPLES = Samples("", ())


@dataclass(frozen=True)
class StreamedStates:
    """`core.SampleStates` of one sample, in the model's dtype."""

    weights: Tensor
    states: _States
    reads: _Writings
    writes: _Writings
    factor: Callable[[int, str], float]  # of what is written (see `core.HiddenStates.stream_factor`)
    generated: bool = False

    def h(self, i: int) -> Tensor:
        return self.states[i].float()

    def read(self, layer: int, writer: str) -> Tensor:
        return self.reads[layer, writer].float()

    def wrote(self, layer: int, writer: str) -> Tensor:
        written, factor = self.writes[layer, writer].float(), self.factor(layer, writer)
        return written if factor == 1 else factor * written


@dataclass(frozen=True)
class Activations:
    """`core.HiddenStates` of a model and a calibration set.

    `stats` must be the calibration of the same `samples`; its selector weighs their tokens (all alike if None).
    `generated` are texts of the dense model's own: they follow the samples, and all their tokens count.
    """

    lvlm: Lvlm
    samples: Samples
    stats: Stats
    batch_size: int = 8
    show: Progress = no_progress
    generated: Samples = NO_SAMPLES
    _factors: dict[tuple[int, str], float | None] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def n_layers(self) -> int:
        """Decoder layers of the dense model."""
        return self.lvlm.anatomy.n_layers

    @property
    def writers(self) -> Sequence[str]:
        """Roles of the residual-writing projections that can be changed."""
        return tuple(self.lvlm.anatomy.writers)

    def has_bias(self, layer: int, writer: str) -> bool:
        """Whether the projections `writer` of a layer have one bias."""
        projections = self.lvlm.anatomy.writers[writer][layer]
        return projections.single and len(projections.biases) == 1

    def stream_factor(self, layer: int, writer: str) -> float | None:
        """See `core.HiddenStates`; measured when it is first asked for (see `layer_trials.stream_factors`)."""
        self._measure_factors([layer])
        return self._factors.get((layer, writer)) or None

    def _required_factor(self, layer: int, writer: str) -> float:
        if factor := self.stream_factor(layer, writer):
            return factor
        raise SvlError(
            f"what '{writer}' of layer {layer} of '{self.lvlm.name}' writes is not added to the residual stream, or "
            "for some tokens or channels only, or times different numbers, so nothing can be fitted to it; choose "
            "another compensation"
        )

    def _measure_factors(self, layers: Collection[int]) -> None:
        if missing := set(layers) - {layer for layer, _ in self._factors}:
            nothing = {(layer, role): None for layer in missing for role in self.lvlm.anatomy.writers}
            self._factors.update(nothing | layer_trials.stream_factors(self.lvlm, missing))
            add_rows(max(missing) + 1)

    @property
    def heads(self) -> tuple[int, int]:
        """See `core.HiddenStates`."""
        return self.lvlm.heads

    def column_sizes(self, layer: int, writer: str) -> Tensor:
        """See `core.HiddenStates`."""
        self.lvlm.require_in_memory("looking at weights")
        weight = stored_tensor(self.lvlm.layers[layer], single_matrix(self.lvlm, layer, writer))
        return weight.detach().to(fp64_device(weight.device)).double().abs().sum(0)

    def stream(
        self,
        points: Sequence[int] = (),
        writers: Sequence[tuple[int, str]] = (),
        plan: Plan | None = None,
        patch: Patch | None = None,
    ) -> Iterator[StreamedStates]:
        """One forward pass over the set, up to the deepest layer asked about; see `core.HiddenStates`.

        All states of a sample are where the model takes its inputs, or on the CPU if that has no fp64.
        """
        if plan and (lost := sorted(set(writers) & set(plan.sublayers))):
            raise SvlError(f"nothing can be fitted to '{lost[0][1]}' of layer {lost[0][0]}, which the plan takes")
        self._measure_factors([layer for layer, _ in writers])
        lvlm = surgery.apply(self.lvlm, plan, patch) if plan and not plan.is_empty else self.lvlm
        kept = plan.kept if plan else range(self.n_layers)
        new = {i: sum(k < i for k in kept) for i in range(self.n_layers + 1)}  # the layer that h_i enters
        deepest = max([new[i] for i in points] + [new[i] + 1 for i, _ in writers], default=0)
        wanted = sorted({deepest, *(new[i] for i in points)})

        def run(model: Lvlm, batch: Sequence[Sample]) -> tuple[Tensor, _States, _Writings, _Writings]:
            states: _States = {}
            reads: _Writings = {}
            writes: _Writings = {}
            with explained_samples(batch), torch.inference_mode(), ExitStack() as stack:
                inputs, present, _ = encode_samples(model, batch)
                stack.enter_context(suppress(EnoughError))
                stack.enter_context(state_hooks(model, wanted, states, stop=True))
                for layer, role in writers:
                    writer = model.anatomy.writers[role][new[layer]]
                    module = model.layers[new[layer]].get_submodule(writer.module)
                    stack.enter_context(writer_hook(module, (layer, role), reads, writes))
                run_decoder(model, inputs)
            if idle := [layer for layer, role in writers if (layer, role) not in writes]:
                raise SvlError(
                    f"layer {idle[0]} of '{model.name}' does not run for samples without an image, so what it writes "
                    "cannot be fitted; leave such samples out"
                )
            return present, states, reads, writes

        place = fp64_device(lvlm.device)
        given = self.samples.batches(self.batch_size, lvlm.needs_equal_images)
        generated = self.generated.batches(self.batch_size)
        marks, traces = [False] * len(given) + [True] * len(generated), iter(self.stats.traces)
        with out_of_memory("compensation", f"lower calibration.batch_size (now {self.batch_size})"):
            shown = lvlm.map(run, [*given, *generated], self.show, "compensate")
            for mark, (present, states, reads, writes) in zip(marks, shown, strict=True):
                reads, writes = ({key: by_sample(x, present.shape) for key, x in of.items()} for of in (reads, writes))
                for b, here in enumerate(present.to(place)):
                    yield StreamedStates(
                        self._weights(None if mark else traces, here),
                        {i: states[new[i]][b].to(place)[here] for i in points},
                        {key: x[b].to(place)[here] for key, x in reads.items()},
                        {key: x[b].to(place)[here] for key, x in writes.items()},
                        self._required_factor,
                        mark,
                    )

    def _weights(self, traces: Iterator[TokenTrace] | None, present: Tensor) -> Tensor:
        """Weights [L, T] of the next sample, whose tokens are `present` in its row of a batch; 1 without traces."""
        selector = self.stats.selector
        weights = torch.ones(int(present.sum()))
        if selector is not None and traces is not None:
            weights = checked_weights(selector, next(traces), self.n_layers)
        return weights.to(present.device).expand(self.n_layers, -1)

    def walk(self, plan: Plan) -> Iterator[WalkStep]:
        """Kept layers from the last one before the first removed layer on; see `core.HiddenStates`.

        What the plan takes of kept layers, those before included, is missing from the pruned model's states.

        Raises:
            SvlError: if the model does something between its layers that running them one by one leaves out.
        """
        self.lvlm.require_in_memory("refitting layer by layer")
        if not plan.removed:
            return
        first = max(plan.removed[0] - 1, 0)
        done = min([first, *(i for i, _ in plan.sublayers)])  # where the two models part
        kept = [i for i in plan.kept if i >= done]
        with out_of_memory("compensation", f"lower calibration.samples (now {len(self.samples)})"):
            walking = self._start(done)
            for here, following in zip(kept, [*kept[1:], self.n_layers], strict=True):
                for sample in walking:
                    for i in range(done, following):
                        sample.dense = sample.run(self.lvlm.layers[i], i, sample.dense)
                done = following
                changed = sublayers.zeroed_tensors(self.lvlm, plan, here)
                step = WalkStep(here, self.lvlm, walking, changed, self._required_factor)
                if here >= first:
                    yield step
                for sample in walking:
                    sample.pruned = sample.run(self.lvlm.layers[here], here, sample.pruned, step.changed)

    def _start(self, first: int) -> list[WalkingSample]:
        """The samples before layer `first`."""
        walking: list[WalkingSample] = []
        traces = iter(self.stats.traces)
        marked = [(sample, False) for sample in self.samples] + [(sample, True) for sample in self.generated]
        for sample, generated in self.show(marked, "record", len(marked)):
            with explained_samples([sample]):
                inputs, present, _ = encode_samples(self.lvlm, [sample])
                if not bool(present.all()):
                    raise SvlError("its prompt has padding of its own, which running layer by layer cannot tell apart")
                replay, _ = record_replay(self.lvlm, inputs, first, check=not walking)
            weights = self._weights(None if generated else traces, present[0])
            walking.append(WalkingSample(replay, weights, replay.state, replay.state, generated))
        return walking


@dataclass
class WalkingSample:
    """One sample on a walk: states [1, T, d] of the dense and of the pruned model."""

    replay: Replay
    weights: Tensor
    dense: Tensor
    pruned: Tensor
    generated: bool = False

    @torch.no_grad()
    def run(self, layer: nn.Module, i: int, state: Tensor, changed: dict[str, Tensor] | None = None) -> Tensor:
        return self.replay.run(layer, i, state, changed)


@dataclass
class WalkStep:
    """`core.LayerStep`."""

    layer: int
    lvlm: Lvlm
    walking: Sequence[WalkingSample]
    changed: dict[str, Tensor]  # parameters of the layer
    factor: Callable[[int, str], float]  # see `core.HiddenStates.stream_factor`

    def rows(self, writer: str) -> Iterator[LayerRows]:
        """See `core.LayerStep`; on the layer's device, or on the CPU if that has no fp64."""
        layer = self.lvlm.layers[self.layer]
        module = layer.get_submodule(single_matrix(self.lvlm, self.layer, writer).removesuffix(".weight"))
        reads: dict[str, Tensor] = {}
        with writer_hook(module, writer, reads, {}):
            for sample in self.walking:
                out = sample.run(layer, self.layer, sample.pruned, self.changed)
                place = fp64_device(out.device)
                read = by_sample(reads[writer], out.shape[:2])
                x, given, wanted = (h[0].to(place).float() for h in (read, out, sample.dense))
                yield LayerRows(x, given, wanted, sample.weights[self.layer].to(place), sample.generated)

    def change(self, writer: str, delta: Tensor) -> Tensor:
        """See `core.LayerStep`."""
        name, factor = single_matrix(self.lvlm, self.layer, writer), self.factor(self.layer, writer)
        delta = delta if factor == 1 else delta / factor
        weight = self.changed[name] if name in self.changed else stored_tensor(self.lvlm.layers[self.layer], name)
        self.changed[name] = folding.fold_update(weight, Update(delta=delta))
        return self.changed[name]


def by_sample(states: Tensor, shape: Sequence[int]) -> Tensor:
    """What a module reads or writes, as [B, T, n]; some are called with rows [B T, n]. `shape` is (B, T)."""
    return states.reshape(*shape, -1) if states.ndim == 2 else states


def single_matrix(lvlm: Lvlm, layer: int, role: str) -> str:
    """The name, within the layer, of the one weight that writes in a role.

    Raises:
        SvlError: if there are several.
    """
    writer = lvlm.anatomy.writers[role][layer]
    if not writer.single:
        raise SvlError(f"the writer '{role}' of layer {layer} has several matrices; this compensation needs one")
    return f"{writer.module}.weight"
