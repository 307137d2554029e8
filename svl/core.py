"""The vocabulary of the framework: what every other module and every method file speaks.

A *strategy* reads statistics and writes a plan; a plan is data; one surgeon executes data. A *selector* says which
tokens of a sample count; a *compensation* computes what is folded into kept weights. Method files import this
module, torch and, for least squares, `svl.regression`; nothing else of svl.

Words have one meaning each: layers are 0-based, `h_i` enters layer i (`h_L` leaves the last one, before the final
norm), `ratio` is the fraction of decoder layers removed, importance is higher for layers to keep.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class SvlError(Exception):
    """A mistake a person can mend: bad input, missing data, full disk. Shown as one line, without a traceback."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" for the closest of `options`, or an empty string."""
    close = difflib.get_close_matches(str(word), [str(o) for o in options], n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise SvlError unless `value` is one of `allowed`."""
    if value not in allowed:
        listing = ", ".join(map(str, allowed))
        raise SvlError(f"{name} is '{value}', but must be one of: {listing}{did_you_mean(value, allowed)}")


def layers_to_remove(ratio: float, n_layers: int) -> int:
    """floor(ratio * n_layers + 0.5): the one rounding rule (10 / 20 / 30 % of 32 layers are 3 / 6 / 10).

    Raises:
        SvlError: if `ratio` lies outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise SvlError(f"ratio is {ratio:g}, but must lie in [0, 1): it is the fraction of decoder layers removed")
    return math.floor(ratio * n_layers + 0.5)


# ------------------------------------------------------------------------------------------------ plan


@dataclass(frozen=True)
class Plan:
    """Which decoder layers go. Plain data: about 1 KB of JSON, valid for any checkpoint of that model.

    Attributes:
        n_layers: decoder layers of the dense model.
        removed: 0-based indices of the layers to remove, ascending.
        importance: one number per original layer, higher = keep (cosine scores: 1 - mean cosine); empty if the
            strategy has none.
        merges: steps (kept layer, the layers merged into it), in order, where the strategy decided on merging; what
            merging does to weights is up to the compensation.
        provenance: how the plan was made (`strategy`, `selector`, `model`, `ratio`, ...); not part of its identity.
    """

    n_layers: int
    removed: tuple[int, ...]
    importance: tuple[float, ...] = ()
    merges: tuple[tuple[int, tuple[int, ...]], ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "removed", tuple(sorted(self.removed)))
        wrong = [i for i in self.removed if not 0 <= i < self.n_layers]
        if wrong or len(set(self.removed)) != len(self.removed):
            raise SvlError(f"plan removes layers {list(self.removed)}, but the model has layers 0..{self.n_layers - 1}")
        if len(self.removed) >= self.n_layers:
            raise SvlError(f"plan removes all {self.n_layers} decoder layers; at least one must stay")
        if self.importance and len(self.importance) != self.n_layers:
            raise SvlError(f"plan has {len(self.importance)} importances for {self.n_layers} layers")

    @property
    def kept(self) -> tuple[int, ...]:
        """0-based indices of the layers that stay, ascending."""
        return tuple(i for i in range(self.n_layers) if i not in set(self.removed))

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Contiguous removed runs as half-open pairs: {3, 4, 7} -> ((3, 5), (7, 8))."""
        runs: list[tuple[int, int]] = []
        for i in self.removed:
            if runs and runs[-1][1] == i:
                runs[-1] = (runs[-1][0], i + 1)
            else:
                runs.append((i, i + 1))
        return tuple(runs)

    def to_json(self) -> str:
        """The plan as JSON text, readable by `from_json`."""
        body: dict[str, Any] = {"n_layers": self.n_layers, "removed": self.removed, "kept": self.kept}
        merges = {"merges": self.merges} if self.merges else {}
        return json.dumps({**body, "importance": self.importance, **merges, **self.provenance}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan; a hand-written one needs `n_layers` and `removed` only.

        Raises:
            SvlError: if the text is not JSON, lacks those keys, or names impossible layers.
        """
        try:
            body = json.loads(text)
            n_layers, removed = int(body.pop("n_layers")), tuple(int(i) for i in body.pop("removed"))
        except (ValueError, TypeError, AttributeError) as error:
            raise SvlError(f"not a plan: {error}") from error
        except KeyError as error:
            raise SvlError(f"not a plan: key {error} is missing (n_layers and removed are needed)") from error
        body.pop("kept", None)
        merges = tuple((int(i), tuple(gone)) for i, gone in body.pop("merges", ()))
        return cls(n_layers, removed, tuple(body.pop("importance", None) or ()), merges, body)


# ----------------------------------------------------------------------------------------- statistics


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
    """

    index: int
    visual: Tensor
    cosine: Tensor | None = None
    windows: Tensor | None = None
    received: Tensor | None = None
    emitted: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None


class TokenSelector(Protocol):
    """Which tokens count: a frozen dataclass whose fields are its settings."""

    needs: ClassVar[frozenset[str]]  # subset of {"cosine", "attention"}

    def weights(self, trace: TokenTrace) -> Tensor:
        """Weights in [0, 1] of the sample's tokens: [T], or [L, T] where every layer has its own."""
        ...


def no_token(selector: TokenSelector) -> SvlError:
    """The error for a selector that gives every token of a calibration set the weight 0."""
    name = type(selector).__name__.lower()
    return SvlError(f"selector '{name}' leaves no token in the calibration set; choose another selector or data")


class Probe(Protocol):
    """The dense model, for strategies that try removals out instead of reading statistics.

    Losses are cross-entropies (nats) of answer tokens given what precedes them, averaged over all answer tokens of the
    calibration set; of plain text, every token but the first of a sample is an answer. Padding, image and prompt
    positions never count.
    """

    def take(self, samples: int | None) -> Probe:
        """The same model on the first `samples` of the calibration set (all if None)."""
        ...

    def losses(self, removed: Collection[int], candidates: Collection[int]) -> tuple[float, dict[int, float]]:
        """Loss without the layers `removed`, and without one more layer, for each of `candidates`."""
        ...

    def changes(self, removed: Collection[int], candidates: Collection[int]) -> dict[int, float]:
        """Mean L2 distance of the answer tokens' logits from those without `removed`, for each of `candidates`."""
        ...

    def similarity(self, plan: Plan, patch: Patch) -> float:
        """Mean over samples of cos(vec(H), vec(H')): H [T, d] leaves the final norm, H' is the pruned model's."""
        ...

    def taylor(self) -> list[float]:
        """Per layer, the sum over its weights (norms, not biases) of |W * sum over samples of dloss/dW|."""
        ...

    def magnitude(self, power: int) -> list[float]:
        """Per layer, the sum over its weights (norms, not biases) of |W|^power."""
        ...


@dataclass(frozen=True)
class Stats:
    """Statistics of one calibration pass, seen through a token selector.

    Attributes:
        n_layers: decoder layers of the model.
        removable: layers that may be removed (the model's protected ones are missing).
        traces: per-sample measurements; iterated from disk, one sample in memory at a time.
        selector: the token weighting behind `cosine()` and `windows()`.
        probe: the model to try removals on; for strategies that need "probe".
    """

    n_layers: int
    removable: tuple[int, ...]
    traces: Iterable[TokenTrace] = ()
    selector: TokenSelector | None = None
    probe: Probe | None = None

    def cosine(self) -> Tensor:
        """Mean cos(h_i, h_{i+1}) over all selected tokens of all samples: fp64 [L].

        Raises:
            SvlError: if the selector leaves no token in the whole calibration set.
        """
        return self._mean("cosine")

    def windows(self, transform: Callable[[Tensor], Tensor] = lambda cosine: cosine) -> Tensor:
        """Mean transform(cos(h_i, h_j)) over all selected tokens of all samples: fp64 [L + 1, L + 1] for i < j.

        Other entries are NaN. Of a selector with weights per layer, those of layer i count.

        Raises:
            SvlError: if the selector leaves no token in the whole calibration set.
        """
        import torch  # not above: the command line starts without it

        i, j = torch.triu_indices(self.n_layers + 1, self.n_layers + 1, 1)
        table = torch.full((self.n_layers + 1,) * 2, math.nan, dtype=torch.float64)
        table[i, j] = self._mean("windows", transform, i)
        return table

    def _mean(
        self, name: str, transform: Callable[[Tensor], Tensor] = lambda x: x, layers: Tensor | None = None
    ) -> Tensor:
        """Mean over tokens of a trace's field [rows, T], whose rows belong to `layers` (all, in order, if None)."""
        if self.selector is None:
            raise SvlError(f"a mean of {name} over tokens needs a token selector")
        total: Any = 0.0
        weight: Any = 0.0
        for trace in self.traces:
            if (values := getattr(trace, name)) is None:
                raise SvlError(f"calibration did not measure '{name}'; add it to calibration.statistics")
            w = self.selector.weights(trace).double()
            w = (w[layers] if w.ndim == 2 and layers is not None else w).expand_as(values)
            total = total + (w * transform(values.double())).sum(-1)
            weight = weight + w.sum(-1)
        if isinstance(weight, float) or not bool((weight > 0).all()):
            raise no_token(self.selector)
        return total / weight

    def plan(self, importance: Iterable[float] | Tensor, n_remove: int) -> Plan:
        """Remove the `n_remove` least important removable layers; of equals the deeper goes first.

        Raises:
            SvlError: if fewer layers may be removed.
        """
        values = [float(x) for x in importance]
        if not all(math.isfinite(x) for x in values):
            raise SvlError(f"layer importance is not finite: {values}")
        order = sorted(self.candidates(n_remove), key=lambda i: (values[i], -i))
        return Plan(self.n_layers, tuple(order[:n_remove]), tuple(values))

    def window(self, distance: Tensor, n_remove: int, first: int = 0) -> Plan:
        """Remove the contiguous block [s, s + n_remove), s >= `first`, of least `distance[s, s + n_remove]`.

        `distance` is [L + 1, L + 1]; importance is its first off-diagonal, the distances across single layers.

        Raises:
            SvlError: if every such block has a protected layer.
        """
        allowed = set(self.candidates(n_remove))
        importance = tuple(distance.diagonal(1).tolist())
        if n_remove == 0:
            return Plan(self.n_layers, (), importance)
        starts = [s for s in range(first, self.n_layers - n_remove + 1) if allowed.issuperset(range(s, s + n_remove))]
        if not starts:
            raise SvlError(f"no {n_remove} layers in a row may be removed; choose a lower ratio, or another strategy")
        start = min(starts, key=lambda s: float(distance[s, s + n_remove]))
        return Plan(self.n_layers, tuple(range(start, start + n_remove)), importance)

    def without(self, layers: Iterable[int]) -> Stats:
        """The same statistics with `layers` protected, too; -1 is the last layer."""
        spared = {i % self.n_layers for i in layers}
        return replace(self, removable=tuple(i for i in self.removable if i not in spared))

    def model(self) -> Probe:
        """The probe, for strategies that need "probe"."""
        if self.probe is None:
            raise SvlError("this strategy tries removals out on the model: it needs 'probe'")
        return self.probe

    def candidates(self, n_remove: int) -> tuple[int, ...]:
        """The removable layers.

        Raises:
            SvlError: if there are fewer than `n_remove` of them, or `n_remove` would leave no layer.
        """
        allowed = min(len(self.removable), self.n_layers - 1)
        if not 0 <= n_remove <= allowed:
            raise SvlError(f"cannot remove {n_remove} of {self.n_layers} decoder layers: at most {allowed} may go")
        return self.removable


class Strategy(Protocol):
    """Which layers go: a frozen dataclass whose fields are its settings."""

    needs: ClassVar[
        frozenset[str]
    ]  # of {"cosine", "windows", "attention", "probe", "weights"}; "weights" is a probe without data

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """A plan that removes `n_remove` layers."""
        ...


# -------------------------------------------------------------------------------------- compensation


@dataclass(frozen=True)
class Update:
    """The change of one residual-writing projection: W <- W + left @ right @ W + delta, and so for its bias.

    `left` [d, k] and `right` [k, d] (the identity where None) act on what the projection writes, whatever its input:
    they apply to every matrix of the writer (experts, too). `delta` [d, n_in] needs a writer of one matrix; `shift`
    [d] is added to the bias and needs one. Parts that are None change nothing.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    delta: Tensor | None = None
    shift: Tensor | None = None


@dataclass(frozen=True)
class Patch:
    """What a compensation folds into kept weights. Layers are original indices.

    Attributes:
        updates: by (layer, writer). A writer is a role of the layer's residual-writing projections: "attn" (o_proj)
            or "mlp" (down_proj).
        blends: layer -> {source layer: coefficient}: every projection (weight and bias, not the norms) of the layer
            becomes this sum over layers of the dense model, before any update.
        notes: what a reader of the results should know.
        spectra: layer -> singular values, descending, of the matrix whose directions its update is made of, where there
            is one; told to the reader only.
    """

    updates: dict[tuple[int, str], Update] = field(default_factory=dict)
    blends: dict[int, dict[int, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    spectra: dict[int, tuple[float, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.updates or self.blends)


def blends(merges: Iterable[tuple[int, Sequence[int]]], formula: str) -> dict[int, dict[int, float]]:
    """What layers become when others are merged into them, step by step, as sums over the dense model's layers.

    One step merges layers l_1 .. l_m into l. `formula` paper: W_l + sum_k (W_{l_k} - W_l) (LaCo, arXiv 2402.11187,
    eq. 1); released: W_{l_m}, to which the sum of its published code telescopes.
    """
    one_of("formula of merging", formula, ("paper", "released"))
    now: dict[int, dict[int, float]] = {}
    for into, gone in merges:
        terms = {into: 1.0 - len(gone), **dict.fromkeys(gone, 1.0)} if formula == "paper" else {gone[-1]: 1.0}
        total: dict[int, float] = {}
        for layer, factor in terms.items():
            for source, coefficient in now.get(layer, {layer: 1.0}).items():
                total[source] = total.get(source, 0.0) + factor * coefficient
        now = {k: v for k, v in now.items() if k not in gone} | {into: {k: c for k, c in total.items() if c != 0}}
    return now


class Sample(Protocol):
    """One calibration sample inside a streaming pass: hidden states of its tokens, padding left out."""

    weights: Tensor  # [T] or [L, T], the selector's

    def h(self, i: int) -> Tensor:
        """Residual stream entering layer i (L: leaving the last): fp32 [T, d]."""
        ...

    def read(self, layer: int, writer: str) -> Tensor:
        """What the projection `writer` of a layer reads: fp32 [T, n_in]."""
        ...

    def wrote(self, layer: int, writer: str) -> Tensor:
        """What the projection `writer` of a layer wrote, bias included: fp32 [T, d]."""
        ...


class Step(Protocol):
    """One kept layer on a walk through the pruned model."""

    layer: int  # original index

    def rows(self, writer: str) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Per sample: what `writer` reads [T, n_in], what the layer gives out and what it should [T, d], weights [T].

        It should give out what the dense model passes to the next kept layer.
        """
        ...

    def change(self, writer: str, delta: Tensor) -> None:
        """Add `delta` [d, n_in] to the weight of `writer`; the walk goes on with the changed layer."""
        ...


class Hidden(Protocol):
    """Hidden states of the calibration set, streamed: nothing is kept between samples."""

    n_layers: int
    writers: Sequence[str]

    def has_bias(self, layer: int, writer: str) -> bool:
        """Whether the projections `writer` of a layer have one bias."""
        ...

    def stream(
        self,
        points: Sequence[int] = (),
        writers: Sequence[tuple[int, str]] = (),
        plan: Plan | None = None,
        patch: Patch | None = None,
    ) -> Iterator[Sample]:
        """One forward pass over the calibration set.

        Gives h_i of every sample for each i in `points`, and what is read and written by each (layer, writer) of
        `writers`. With a plan (and a patch) the pruned model runs; layers keep their original indices, and h_i of a
        removed layer i is what enters the next kept one.
        """
        ...

    def walk(self, plan: Plan) -> Iterator[Step]:
        """Kept layers in order, from the last one before the first removed layer on, on pruned and dense states.

        Keeps two hidden states per token of the calibration set. Samples run one by one, without padding.
        """
        ...


class Compensation(Protocol):
    """What is put in the gap: a frozen dataclass whose fields are its settings."""

    needs: ClassVar[frozenset[str]]  # {"hidden"} if `fit` streams hidden states, else empty

    def fit(self, hidden: Hidden, plan: Plan) -> Patch:
        """The updates of kept weights that make up for the layers that `plan` removes."""
        ...
