"""Trying removals out on the dense model: losses, output changes, gradients. Nothing is ever rebuilt.

Every sample runs alone, so there is no padding to leak. Its first pass records what each decoder layer is called
with; later passes run the layers by themselves, from the first removable one on. All candidates of a greedy step go
through the layers in one batch that grows on the way: where candidate i would be skipped, the state that enters layer
i joins the batch as it is. Candidate j thus runs the layers above j only, which halves the work, and every layer is
called once per sample. States are also kept at a few depths (`memory` bytes in all): the next step starts above the
depth where it differs from the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from svl.calibration.layer_gradients import layer_weights, size_of, taylor_salience
from svl.calibration.layer_replay import Replay, record_replay
from svl.calibration.logits import LogitTail, find_logit_tail
from svl.calibration.row_count import add_rows, counted_rows
from svl.calibration.sublayer_sweep import Sublayer, block_name, block_number, sublayer_of, sweep_sublayers
from svl.core import Patch, Plan, SvlError
from svl.core.errors import out_of_memory
from svl.data.samples import Sample, Samples
from svl.models.lvlm import Lvlm, Progress, no_progress
from svl.models.placement import stored_tensor
from svl.models.sample_inputs import encode_answer, explained_samples
from svl.processes import all_or_none, gather_shares, gather_values, my_share, process_rank
from svl.pruning import surgery

Remember = Callable[[str, dict[str, Any], Callable[[], Any]], Any]
Swept = Iterator[tuple["ScoredSample", tuple[int, ...], Tensor]]
BASE = -1  # the row with nothing more removed
TOKENS = 2048  # tokens whose logits are computed at once
MEMORY = 2**31  # bytes for states kept between the steps of a search


def compute_anew(what: str, inputs: dict[str, Any], compute: Callable[[], Any]) -> Any:
    """Remembers nothing."""
    return compute()


@dataclass
class ScoredSample:
    """One sample, ready to run through the decoder layers."""

    replay: Replay
    positions: Tensor  # [n], whose logits predict
    targets: Tensor  # [n], these tokens
    kept: dict[int, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)  # depth -> rows (see `_sweep`)

    @property
    def state(self) -> Tensor:
        """[1, T, d], enters the first layer that is run (`replay.start`)."""
        return self.replay.state


class ModelProbe:
    """`core.RemovalProbe` on a model and a calibration set.

    Args:
        lvlm: the dense model.
        samples: the calibration set; None if only weights are asked about.
        memory: bytes for states kept between the steps of a search.
        remember: `remember(what, inputs, compute)` gives the JSON value of `compute()`, or the same from earlier.
        show: wraps an iteration over samples for a progress display.

    Raises:
        SvlError: if a sample has no answer, or the model computes its logits in a way that is not known here.
    """

    def __init__(
        self,
        lvlm: Lvlm,
        samples: Samples | None,
        *,
        memory: int = MEMORY,
        remember: Remember = compute_anew,
        show: Progress = no_progress,
    ):
        self.lvlm, self.samples, self.memory = lvlm, samples or Samples("", ()), memory
        self.remember, self.show = remember, show
        self.layers, self.n_layers = lvlm.layers, lvlm.anatomy.n_layers
        self.start = min(lvlm.anatomy.removable, default=0)
        self.samples.check_answered("a loss")
        self._tail: LogitTail | None = None
        self._records: dict[tuple[int, int], ScoredSample] = {}  # by first layer and sample

    def with_samples(self, n: int | None) -> ModelProbe:
        """See `core.RemovalProbe`."""
        if n is not None and n < 1:
            raise SvlError(f"strategy.samples is {n}, but must be at least 1 (or null for all)")
        if n is None or n >= len(self.samples):
            return self
        first = Samples(self.samples.source, self.samples.samples[:n])
        return ModelProbe(self.lvlm, first, memory=self.memory, remember=self.remember, show=self.show)

    @property
    def scored(self) -> list[ScoredSample]:
        """This process's share of the samples (all, if it is the only one), recorded on first use."""
        return self._recorded(my_share(len(self.samples)), self.start)

    def _recorded(self, numbers: Iterable[int], start: int) -> list[ScoredSample]:
        if not len(self.samples):
            raise SvlError("strategies that try removals out need calibration samples, but there are none")
        if missing := [n for n in numbers if (start, n) not in self._records]:
            with torch.no_grad():
                for n in self.show(missing, "record", len(missing)):
                    with counted_rows() as count:
                        self._records[start, n] = self._record(self.samples.samples[n], start)
                    # Every process tries its first sample out; that of the first one counts, however many there are.
                    add_rows(count.rows if process_rank() == 0 else self.n_layers)
        return [self._records[start, n] for n in numbers]

    @property
    def tail(self) -> LogitTail:
        """What follows the last layer, found with the first sample."""
        if self._tail is None:
            raise RuntimeError("no sample is recorded yet")
        return self._tail

    def losses(self, removed: Collection[int], candidates: Collection[int]) -> tuple[float, dict[int, float]]:
        """See `core.RemovalProbe`."""

        values = self._try("loss", _nll, removed, candidates, self._sweep)
        return values.pop(BASE), values

    def sublayer_losses(
        self, removed: Collection[Sublayer], candidates: Collection[Sublayer]
    ) -> tuple[float, dict[Sublayer, float]]:
        """See `core.RemovalProbe`."""
        gone, tried = ([block_number(block) for block in blocks] for blocks in (removed, candidates))
        values = self._try("sublayer loss", _nll, gone, tried, self._sweep_sublayers, block_name)
        return values.pop(BASE), {sublayer_of(number): value for number, value in values.items()}

    def changes(self, removed: Collection[int], candidates: Collection[int]) -> dict[int, float]:
        """See `core.RemovalProbe`."""

        def distance(logits: Tensor, base: Tensor, targets: Tensor) -> float:
            return float(torch.linalg.vector_norm(logits - base, dim=-1).sum())

        values = self._try("change", distance, removed, candidates, self._sweep)
        del values[BASE]
        return values

    def similarity(self, plan: Plan, patch: Patch) -> float:
        """See `core.RemovalProbe`.

        Raises:
            SvlError: if the patch changes a layer that cannot run by itself, as more enters behind it.
        """
        changed, lowest = [*patch.blends, *patch.joins, *(i for i, _ in patch.updates)], self.lvlm.anatomy.entered
        if (first := min(changed, default=self.start)) < lowest:
            raise SvlError(
                f"how similar '{self.lvlm.name}' stays with another layer {first} cannot be told by running layers one "
                f"by one, as visual features enter behind layers 0..{lowest - 1} (DeepStack)"
            )
        start = self.start if first >= self.start else lowest  # of few records, whichever layers are changed

        @torch.no_grad()
        def measure_share() -> list[float]:
            pruned, found = surgery.apply(self.lvlm, plan, patch), []
            for sample in self._recorded(my_share(len(self.samples)), start):
                ends = []
                for layers, indices in ((self.layers, range(self.n_layers)), (pruned.layers, plan.kept)):
                    state = sample.state
                    for layer, i in zip(layers, indices, strict=True):
                        if i >= start:
                            state = sample.replay.run(layer, i, state)
                    ends.append(self.tail.norm(state).float().flatten())
                found.append(float(F.cosine_similarity(ends[0], ends[1], dim=0)))
            return found

        def compute() -> float:
            total = sum(gather_shares(all_or_none(measure_share), len(self.samples)))
            return _finite(total / len(self.samples), f"the similarity of '{self.lvlm.name}' without {plan.removed}")

        blends = {str(i): {str(k): c for k, c in terms.items()} for i, terms in patch.blends.items()}
        return self._remembered("similarity", {"removed": plan.removed, "blends": blends}, compute)

    def taylor(self) -> list[float]:
        """See `core.RemovalProbe`; protected layers before the first removable one get the largest value."""
        if any(p.is_meta for layer in self.layers for p in layer.parameters()):
            raise SvlError(
                f"gradients need all of '{self.lvlm.name}' in memory, but model.device_map leaves layers elsewhere: "
                "choose another map, or another strategy"
            )

        def compute() -> list[float]:
            if process_rank() > 0:
                return []  # sums of gradients are the first process's, so that they do not depend on their number
            return taylor_salience(
                list(enumerate(self.layers))[self.start :],
                self._recorded(range(len(self.samples)), self.start),
                lambda i, state, sample: sample.replay.run(self.layers[i], i, state),
                self.tail.logits,
                lambda scored: self.show(scored, "gradients", len(scored)),
            )

        found: list[float] = self._remembered("taylor", {"start": self.start}, compute)
        return [max(found)] * self.start + found

    def magnitude(self, power: int) -> list[float]:
        """See `core.RemovalProbe`."""
        return [
            sum(size_of(stored_tensor(layer, name).float(), power) for name, _ in layer_weights(layer))
            for layer in self.layers
        ]

    def _record(self, sample: Sample, start: int) -> ScoredSample:
        """Run one sample through the dense model and keep what its layers, from `start` on, are called with."""
        if self.lvlm.needs_equal_images:  # layers cannot run for several candidates at once
            raise SvlError(
                f"'{self.lvlm.name}' reads images by cross-attention, so strategies that try removals out cannot be "
                "used; choose one that reads statistics"
            )
        inputs, answer = encode_answer(self.lvlm, sample)
        check = all(first != start for first, _ in self._records)
        with explained_samples([sample]):
            replay, logits = record_replay(self.lvlm, inputs, start, check)
        positions = answer.nonzero()[:, 0]
        positions = positions[positions > 0]
        scored = ScoredSample(replay, positions - 1, inputs["input_ids"][0, positions])
        if self._tail is None:
            state = scored.state
            for i in range(start, self.n_layers):
                state = scored.replay.run(self.layers[i], i, state)
            self._tail = find_logit_tail(self.lvlm, state, logits)
        return scored

    def _remembered(self, what: str, inputs: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """What `compute` gives on these samples, or gave earlier: its cost is kept, and counted, with the value."""

        def measure() -> dict[str, Any]:
            with counted_rows() as count:
                value = all_or_none(compute)
            return {"value": value, "rows": sum(gather_values(count.rows))}  # of all processes, which share the samples

        advice = "lower strategy.samples or calibration.samples, set model.device=cpu, or choose another strategy"
        with out_of_memory("planning", advice):
            found = self.remember(what, {"samples": len(self.samples), **inputs}, measure)
        add_rows(found["rows"])
        return found["value"]

    def _try(
        self,
        what: str,
        measure: Callable[[Tensor, Tensor, Tensor], float],
        removed: Collection[int],
        candidates: Collection[int],
        sweep: Callable[[Collection[int], Collection[int]], Swept],
        called: Callable[[int], str] = "layer {}".format,
    ) -> dict[int, float]:
        """Sums of `measure(logits [n, V], base logits, targets)` per answer token, by row of `sweep`."""

        @torch.no_grad()
        def measure_share() -> list[tuple[dict[int, float], int]]:
            found = []
            for sample, rows, states in sweep(removed, candidates):
                values: dict[int, float] = {}
                base: Tensor | None = None
                for logits, i in self._logits(states, rows, sample.positions):
                    base = logits if base is None else base  # the first row
                    values[i] = measure(logits, base, sample.targets.to(logits.device))
                found.append((values, len(sample.targets)))
            return found

        def compute() -> dict[str, float]:
            tokens, total = 0, dict.fromkeys((BASE, *candidates), 0.0)
            for values, n_targets in gather_shares(all_or_none(measure_share), len(self.samples)):
                for i, value in values.items():
                    total[i] += value
                tokens += n_targets
            for i, value in total.items():
                _finite(value, f"the {what} of '{self.lvlm.name}'" + ("" if i == BASE else f" without {called(i)}"))
            return {str(i): value / tokens for i, value in total.items()}

        inputs = {"removed": sorted(removed), "candidates": sorted(candidates)}
        return {int(i): value for i, value in self._remembered(what, inputs, compute).items()}

    def _sweep_sublayers(self, removed: Collection[int], candidates: Collection[int]) -> Swept:
        """As `_sweep`, of blocks by number."""
        for sample in self.show(self.scored, f"{len(candidates)} removals", len(self.scored)):

            def run(i: int, states: Tensor, sample: ScoredSample = sample) -> Tensor:
                return sample.replay.run(self.layers[i], i, states)

            rows, states = sweep_sublayers(
                run, self.layers, self.lvlm.anatomy, sample.state, self.start, removed, candidates
            )
            yield sample, (BASE, *rows), states

    def _sweep(self, removed: Collection[int], candidates: Collection[int]) -> Swept:
        """For every sample: rows (`BASE`, then candidates ascending) and their states that leave the last layer.

        The batch that enters layer i is the base with the candidates below i.
        """
        gone, tried = frozenset(removed), tuple(sorted(candidates))
        depths = self._depths(tried)
        for sample in self.show(self.scored, f"{len(tried)} removals", len(self.scored)):
            rows: tuple[int, ...] = (BASE,)
            begin, states = self.start, sample.state
            for depth, (key, kept) in sorted(sample.kept.items(), reverse=True):
                if key == (*sorted(i for i in gone if i < depth), BASE, *(i for i in tried if i < depth)):
                    begin, rows, states = depth, (BASE, *(i for i in tried if i < depth)), kept
                    break
            for depth in [d for d in sample.kept if d > begin]:
                del sample.kept[depth]
            for i in range(begin, self.n_layers):
                if i in depths and i > begin:
                    sample.kept[i] = ((*sorted(k for k in gone if k < i), *rows), states)
                if i in gone:
                    continue
                after = sample.replay.run(self.layers[i], i, states)
                if i in tried:
                    after, rows = torch.cat([after, states[:1].to(after.device)]), (*rows, i)
                states = after
            yield sample, rows, states

    def _depths(self, tried: tuple[int, ...]) -> set[int]:
        """Where to keep states: as many depths as `memory` allows, evenly spaced between the candidates."""
        state = sum(r.state.nbytes for r in self.scored)
        for step in range(1, len(tried)):
            depths = set(tried[step::step])
            if sum(state * (1 + sum(i < d for i in tried)) for d in depths) <= self.memory:
                return depths
        return set()

    def _logits(self, states: Tensor, rows: tuple[int, ...], positions: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Logits [n, vocabulary] at `positions`, row by row."""
        step, positions = max(1, TOKENS // len(positions)), positions.to(states.device)
        for first in range(0, len(rows), step):
            logits = self.tail.logits(states[first : first + step, positions]).float()
            yield from zip(logits, rows[first : first + step], strict=True)


def _nll(logits: Tensor, base: Tensor, targets: Tensor) -> float:
    """Cross-entropy of `logits` [n, V], summed over positions."""
    return float(F.cross_entropy(logits, targets, reduction="sum"))


def _finite(value: float, what: str) -> float:
    if not math.isfinite(value):
        raise SvlError(f"{what} is not finite, so nothing can be chosen by it; choose another model.dtype")
    return value
