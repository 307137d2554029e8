"""What calibration measured, seen through a token selector."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from svl.core.contract import checked_weights
from svl.core.errors import SvlError, one_of
from svl.core.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from svl.core.methods import RemovalProbe, Rescoring, TokenSelector


@dataclass(frozen=True)
class TokenTrace:
    """What calibration measured on one sample: scalars per token and layer, no hidden states, no padding.

    L layers, T tokens of the sample, fp32. Modality 0 is visual, 1 textual. Attention is averaged over heads.
    Size: 4 L T (1 + 4 + (L + 1) / 2) bytes with all statistics, e.g. 1.8 MB for 32 layers and 640 tokens.

    Attributes:
        index: number of the sample in its calibration set.
        visual: bool [T], True where the token is an image placeholder.
        cosine: [L, T], cos(h_i, h_{i+1}).
        windows: [(L + 1) L / 2, T], cos(h_i, h_j) of all pairs i < j, ordered (0, 1), (0, 2), ..., (L - 1, L).
        received: [L, 2, T], attention that key j got, summed over the queries of each modality.
        emitted: [L, 2, T], attention that query i paid, summed over the keys of each modality.
        queries: [L or 1, 2, T], how many queries of each modality can see key j.
        keys: [L or 1, 2, T], how many keys of each modality query i can see.
        sublayers: [2, L, T], cos(x, x + f(x)) of attention (first) and MLP, f being what they add to the stream x.
        gone: layers of the dense model that the measured one lacks, by their numbers there; rows are of the others.
    """

    index: int
    visual: Tensor
    cosine: Tensor | None = None
    windows: Tensor | None = None
    received: Tensor | None = None
    emitted: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    sublayers: Tensor | None = None
    gone: tuple[int, ...] = ()

    def row_of(self, layer: int, n_rows: int, setting: str) -> int:
        """Which of `n_rows` rows, one per layer, is that of the layer of this number in the dense model.

        Raises:
            SvlError: if there is no such layer, or it has gone; `setting` is what named it.
        """
        n_layers = n_rows + len(self.gone)
        if not 0 <= layer < n_layers:
            raise SvlError(f"{setting} is {layer}, but the model has layers 0..{n_layers - 1}")
        if layer in self.gone:
            raise SvlError(
                f"{setting} is {layer}, but layer {layer} has gone: name another one, or keep it with model.protect"
            )
        return layer - sum(i < layer for i in self.gone)


def no_selected_token(selector: TokenSelector) -> SvlError:
    """The error for a selector that gives every token of a calibration set the weight 0."""
    name = type(selector).__name__.lower()
    return SvlError(f"selector '{name}' leaves no token in the calibration set; choose another selector or data")


def check_finite(importance: list[float]) -> None:
    """Raise SvlError unless all values that layers, or parts of them, are ranked by are finite."""
    if not all(math.isfinite(x) for x in importance):
        raise SvlError(f"layer importance is not finite: {importance}")


@dataclass(frozen=True)
class Stats:
    """Statistics of one calibration pass, seen through a token selector.

    Where layers have gone already (`gone`), the others are counted anew, from 0: tables, `removable` and plans have
    these numbers. Settings that name layers mean the dense model's, which are those of `numbers` and `without`.

    Attributes:
        n_layers: decoder layers of the model.
        removable: layers that may be removed (the model's protected ones are missing).
        traces: per-sample measurements; iterated from disk, one sample in memory at a time.
        selector: the token weighting behind `cosine()` and `windows()`.
        probe: the model to try removals on; for strategies that need "probe".
        rescoring: what is left of the model after removals; for strategies that need "rescoring".
        gone: layers of the dense model that the measured one lacks, by their numbers there.
        kinds: for strategies that merge layers: a number for every layer, equal where projections have the same names
            and shapes; None where nothing is merged into a layer; empty if all can be merged.
    """

    n_layers: int
    removable: tuple[int, ...]
    traces: Iterable[TokenTrace] = ()
    selector: TokenSelector | None = None
    probe: RemovalProbe | None = None
    rescoring: Rescoring | None = None
    gone: tuple[int, ...] = ()
    kinds: tuple[int | None, ...] = ()

    @property
    def dense_layers(self) -> int:
        """Decoder layers of the dense model."""
        return self.n_layers + len(self.gone)

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers that the layers have in the dense model, ascending."""
        return tuple(i for i in range(self.dense_layers) if i not in self.gone)

    def cosine(self) -> Tensor:
        """Mean cos(h_i, h_{i+1}) over all selected tokens of all samples: fp64 [L].

        Raises:
            SvlError: if the selector leaves no token in the whole calibration set.
        """
        return self._mean("cosine")

    def sublayers(self) -> Tensor:
        """Mean cos(x, x + f(x)) over all selected tokens of all samples: fp64 [2, L], attention first.

        Raises:
            SvlError: if the selector leaves no token in the whole calibration set, or a mean is not finite.
        """
        means = self._mean("sublayers")
        check_finite(means.flatten().tolist())
        return means

    def windows(self, transform: Callable[[Tensor], Tensor] = lambda cosine: cosine, over: str = "tokens") -> Tensor:
        """Mean transform(cos(h_i, h_j)) over all selected tokens of all samples: fp64 [L + 1, L + 1] for i < j.

        Other entries are NaN. Of a selector with weights per layer, those of layer i count. With `over` samples, every
        sample has the same weight, whatever its length: the mean of the samples' means, without samples that have no
        selected token.

        Raises:
            SvlError: if the selector leaves no token in the whole calibration set.
        """
        import torch  # not above: the command line starts without it

        i, j = torch.triu_indices(self.n_layers + 1, self.n_layers + 1, 1)
        table = torch.full((self.n_layers + 1,) * 2, math.nan, dtype=torch.float64)
        table[i, j] = self._mean("windows", transform, i, over)
        return table

    def _mean(
        self,
        name: str,
        transform: Callable[[Tensor], Tensor] = lambda x: x,
        layers: Tensor | None = None,
        over: str = "tokens",
    ) -> Tensor:
        """Mean over tokens of a trace's field [rows, T], whose rows belong to `layers` (all, in order, if None)."""
        one_of("the mean", over, ("tokens", "samples"))
        if self.selector is None:
            raise SvlError(f"a mean of {name} over tokens needs a token selector")
        total: Any = 0.0
        weight: Any = 0.0
        for trace in self.traces:
            if (values := getattr(trace, name)) is None:
                raise SvlError(f"calibration did not measure '{name}'; add it to calibration.statistics")
            w = checked_weights(self.selector, trace, self.n_layers).double()
            w = (w[layers] if w.ndim == 2 and layers is not None else w).expand_as(values)
            here, mass = (w * transform(values.double())).sum(-1), w.sum(-1)
            if over == "samples":  # each of weight 1, if any token is selected
                here, mass = here / mass.where(mass > 0, 1), (mass > 0).double()
            total, weight = total + here, weight + mass
        if isinstance(weight, float) or not bool((weight > 0).all()):
            raise no_selected_token(self.selector)
        return total / weight

    def plan(self, importance: Iterable[float] | Tensor, n_remove: int) -> Plan:
        """Remove the `n_remove` least important removable layers; of equals the deeper goes first.

        Raises:
            SvlError: if fewer layers may be removed.
        """
        values = [float(x) for x in importance]
        check_finite(values)
        order = sorted(self.candidates(n_remove), key=lambda i: (values[i], -i))
        return Plan(self.n_layers, tuple(order[:n_remove]), tuple(values))

    def window(self, distance: Tensor, n_remove: int, first: int = 0) -> Plan:
        """Remove the contiguous block [s, s + n_remove), s >= `first`, of least `distance[s, s + n_remove]`.

        `distance` is [L + 1, L + 1]; importance is its first off-diagonal, the distances across single layers.

        Raises:
            SvlError: if every such block has a protected layer.
        """
        self.candidates(n_remove)
        importance = tuple(distance.diagonal(1).tolist())
        if n_remove == 0:
            return Plan(self.n_layers, (), importance)
        start = min(self.starts(n_remove, first), key=lambda s: float(distance[s, s + n_remove]))
        return Plan(self.n_layers, tuple(range(start, start + n_remove)), importance)

    def starts(self, n_remove: int, first: int = 0) -> list[int]:
        """Where a block of so many layers that may all go can start, from `first` on.

        Raises:
            SvlError: if there is none.
        """
        allowed = set(self.candidates(n_remove))
        found = [s for s in range(first, self.n_layers - n_remove + 1) if allowed.issuperset(range(s, s + n_remove))]
        if not found:
            raise SvlError(f"no {n_remove} layers in a row may be removed; choose a lower ratio, or another strategy")
        return found

    def without(self, layers: Iterable[int]) -> Stats:
        """The same statistics with `layers` protected, too, by their numbers in the dense model; -1 is its last, ...

        Raises:
            SvlError: if it has no such layer.
        """
        layers, depth, numbers = tuple(layers), self.dense_layers, self.numbers
        if wrong := [i for i in layers if not -depth <= i < depth]:
            raise SvlError(
                f"strategy.protected names layers {wrong}, but the model has layers 0..{depth - 1} "
                f"(from the end: -1..-{depth})"
            )
        spared = {i % depth for i in layers}
        return replace(self, removable=tuple(i for i in self.removable if numbers[i] not in spared))

    def required_probe(self) -> RemovalProbe:
        """The probe, for strategies that need "probe" or "weights".

        Raises:
            SvlError: if there is none.
        """
        if self.probe is None:
            raise SvlError("this strategy tries removals out on the model: it needs 'probe'")
        return self.probe

    def required_rescoring(self) -> Rescoring:
        """The rescoring, for strategies that need it.

        Raises:
            SvlError: if there is none.
        """
        if self.rescoring is None:
            raise SvlError("this strategy measures the model again after each removal: it needs 'rescoring'")
        return self.rescoring

    def can_merge(self, into: int, gone: Iterable[int]) -> bool:
        """Whether layers can be merged into another one (see `kinds`)."""
        kinds = {self.kinds[i] for i in (into, *gone)} if self.kinds else {0}
        return len(kinds) == 1 and None not in kinds

    def candidates(self, n_remove: int) -> tuple[int, ...]:
        """The removable layers.

        Raises:
            SvlError: if there are fewer than `n_remove` of them, or `n_remove` would leave no layer.
        """
        allowed = min(len(self.removable), self.n_layers - 1)
        if not 0 <= n_remove <= allowed:
            raise SvlError(f"cannot remove {n_remove} of {self.n_layers} decoder layers: at most {allowed} may go")
        return self.removable
