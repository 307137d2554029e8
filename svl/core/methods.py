"""What the framework asks of methods, and what it hands to them.

A method is one frozen dataclass in one file; its fields are its settings, with their types and defaults, and `needs`
says what must have been measured before it is called. `svl.core.contract` checks what methods answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from svl.core.patch import Patch
    from svl.core.plan import Plan
    from svl.core.stats import Stats, TokenTrace


STATISTICS = ("cosine", "windows", "sublayers", "attention")  # what a calibration pass can measure


@dataclass(frozen=True)
class Method:
    """Base of every method.

    Attributes:
        needs: what must be there when the method is called; nothing by default.
        known_needs: what methods of this kind may ask for.
        does_nothing: whether it is its group's `none`, whose stage is left out.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    known_needs: ClassVar[frozenset[str]] = frozenset()
    does_nothing: ClassVar[bool] = False


@dataclass(frozen=True)
class TokenSelector(Method, ABC):
    """Which tokens count."""

    known_needs: ClassVar[frozenset[str]] = frozenset(STATISTICS)

    @abstractmethod
    def weights(self, trace: TokenTrace) -> Tensor:
        """Weights in [0, 1] of the sample's tokens, on the CPU: [T], or [L, T] where every layer has its own."""

    def scores(self, trace: TokenTrace) -> Tensor:
        """What the weights are made from, for the figure of token importance: [T] or [L, T]; the weights by default."""
        return self.weights(trace)


@dataclass(frozen=True)
class Strategy(Method, ABC):
    """Which layers go.

    `needs`: the statistics it reads ("cosine", "windows", "sublayers", "attention"), "probe" to try removals out on the
    model, with "gradients" besides for `RemovalProbe.taylor`, "weights" for a probe without data, or "rescoring" to
    measure again after removals.

    Attributes:
        stepwise: whether it makes sense to ask for one layer, again and again, each time of the layers that are left
            (`strategy=iterative`): it judges every layer by itself. One that chooses layers together (a block, a set
            with gaps or clusters, merges, parts of layers) would choose something else than it is meant to.
        sublayers_for_one: how many sub-layers (attentions, MLPs) go for each layer that is asked for: of strategies
            that choose whole layers, both of each.
    """

    known_needs: ClassVar[frozenset[str]] = frozenset({*STATISTICS, "probe", "gradients", "weights", "rescoring"})
    stepwise: ClassVar[bool] = False
    sublayers_for_one: ClassVar[int] = 2

    def check(self, stats: Stats, n_remove: int) -> None:
        """Raise SvlError for settings that cannot be on this model; asked before anything is measured.

        `stats` says how many layers there are and which may go, and nothing else.
        """
        stats.candidates(n_remove)

    @abstractmethod
    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """A plan that removes `n_remove` layers (0-based), none of them protected."""


@dataclass(frozen=True)
class Compensation(Method, ABC):
    """What is put in the gap.

    `needs`: {"hidden"} if `fit` streams hidden states.

    Attributes:
        foldable: whether all that it changes are weights of kept layers. One that puts maps at cuts says False: it
            works in memory, on any kind of layer, but is refused where a checkpoint is asked for.
        joins: whether it joins layers (`Patch.joins`), so that models whose layers cannot be are refused at once.
        only_scales: whether all that it does to what projections write is to multiply it by numbers, which a gate for
            each channel behind them does not disturb.
        in_memory: whether `fit` needs the whole model in memory, so that it is refused with `model.offload`.
    """

    known_needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    foldable: ClassVar[bool] = True
    joins: ClassVar[bool] = False
    only_scales: ClassVar[bool] = False
    in_memory: ClassVar[bool] = False

    @property
    def own_texts(self) -> int:
        """How many texts of the dense model's own `fit` is to see, unless the configuration says."""
        return 0

    def check_plan(self, plan: Plan) -> None:
        """Raise SvlError if nothing can be fitted for such a plan; asked as soon as the plan is known."""

    def refitted(self, plan: Plan) -> Collection[tuple[int, str]]:
        """Writers, as (layer, role), whose weights change one by one, so that each must be a single matrix."""
        return ()

    @abstractmethod
    def fit(self, hidden: HiddenStates, plan: Plan) -> Patch:
        """Changes of kept weights, or maps at cuts, which make up for what `plan` removes: fp32 on the CPU.

        A plan may also take attentions or MLPs of kept layers (`plan.sublayers`): those must not be changed, and gaps
        are those of the model without them, which `hidden.stream(..., plan.with_layers(()))` runs.
        """

    def extend(self, hidden: HiddenStates, plan: Plan, patch: Patch) -> Patch:
        """What `fit` gives for a plan with an order, `patch` being what it gave for all removals but the last one.

        For compensations whose patch grows from removal to removal; by default, a new fit.
        """
        return self.fit(hidden, plan)


class RemovalProbe(Protocol):
    """The dense model, for strategies that try removals out instead of reading statistics.

    Losses are cross-entropies (nats) of answer tokens given what precedes them, averaged over all answer tokens of the
    calibration set; of plain text, every token but the first of a sample is an answer. Padding, image and prompt
    positions never count.
    """

    def with_samples(self, n: int | None) -> RemovalProbe:
        """The same model on the first `n` samples of the calibration set (all if None)."""
        ...

    def losses(self, removed: Collection[int], candidates: Collection[int]) -> tuple[float, dict[int, float]]:
        """Loss without the layers `removed`, and without one more layer, for each of `candidates`."""
        ...

    def sublayer_losses(
        self, removed: Collection[tuple[int, str]], candidates: Collection[tuple[int, str]]
    ) -> tuple[float, dict[tuple[int, str], float]]:
        """As `losses`, without attentions and MLPs: (layer, "attn" or "mlp")."""
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


class Rescoring(Protocol):
    """What is left of the model after removals, compensated, for strategies that measure again after each of them."""

    def next_removal(self, strategy: Strategy, removed: Sequence[int]) -> tuple[int, dict[int, float], float]:
        """The layer that `strategy` removes next, once the layers `removed` have gone, in this order.

        Also the importance of every layer that was there (empty if the strategy gives none), by original number, and
        how many passes of the dense model over the calibration set would run as many layers as this has taken.
        """
        ...


class SampleStates(Protocol):
    """One calibration sample inside a streaming pass: hidden states of its tokens, padding left out.

    All are on one device, which has fp64.
    """

    weights: Tensor  # [L, T], the selector's, by layer; on the device of the states
    generated: bool  # whether it is a text that the dense model wrote; all tokens of such a sample weigh 1

    def h(self, i: int) -> Tensor:
        """Residual stream entering layer i (L: leaving the last): fp32 [T, d]."""
        ...

    def read(self, layer: int, writer: str) -> Tensor:
        """What the projection `writer` of a layer reads: fp32 [T, n_in]."""
        ...

    def wrote(self, layer: int, writer: str) -> Tensor:
        """What the projection `writer` of a layer wrote, bias included, as the layer adds it to the stream (times a
        constant, or a gate, where it has one): fp32 [T, d].
        """
        ...


class LayerRows(NamedTuple):
    """Tokens of one calibration sample at a kept layer, fp32.

    Attributes:
        read: by the projection asked about: [T, n_in].
        given: out by the layer: [T, d].
        wanted: what the dense model passes to the next kept layer: [T, d].
        weights: the selector's: [T].
        generated: see SampleStates.
    """

    read: Tensor
    given: Tensor
    wanted: Tensor
    weights: Tensor
    generated: bool


class LayerStep(Protocol):
    """One kept layer on a walk through the pruned model."""

    layer: int  # original index

    def rows(self, writer: str) -> Iterator[LayerRows]:
        """What `writer` reads, what the layer gives out and what it should, sample by sample."""
        ...

    def change(self, writer: str, delta: Tensor) -> Tensor:
        """Let `writer` add `delta` x more to the residual stream for what it reads, x, and give its new weight.

        `delta` is [d, n_in]. The walk goes on with that weight.
        """
        ...


class HiddenStates(Protocol):
    """Hidden states of the calibration set, streamed: nothing is kept between samples.

    Texts that the dense model has generated, if there are any, come last.
    """

    n_layers: int
    writers: Sequence[str]

    def has_bias(self, layer: int, writer: str) -> bool:
        """Whether the projections `writer` of a layer have one bias."""
        ...

    def stream_factor(self, layer: int, writer: str) -> float | None:
        """How many times what the projections `writer` of a layer give is added to the residual stream: mostly 1.

        None if that is not one number for all channels and tokens, or the layer does not run on an example: then
        `SampleStates.wrote` and `LayerStep.change`, which allow for it already, are errors.
        """
        ...

    @property
    def heads(self) -> tuple[int, int]:
        """How many query heads, and how many key-value heads, an attention of the model has."""
        ...

    def column_sizes(self, layer: int, writer: str) -> Tensor:
        """Per column of the weight [d, n_in] of a layer's `writer`, the sum of absolute values: fp64 [n_in]."""
        ...

    def stream(
        self,
        points: Sequence[int] = (),
        writers: Sequence[tuple[int, str]] = (),
        plan: Plan | None = None,
        patch: Patch | None = None,
    ) -> Iterator[SampleStates]:
        """One forward pass over the calibration set.

        Gives h_i of every sample for each i in `points`, and what is read and written by each (layer, writer) of
        `writers`. With a plan (and a patch) the pruned model runs; layers keep their original indices, and h_i of a
        removed layer i is what enters the next kept one.
        """
        ...

    def walk(self, plan: Plan) -> Iterator[LayerStep]:
        """Kept layers in order, from the last one before the first removed layer on, on pruned and dense states.

        Keeps two hidden states per token of the calibration set. Samples run one by one, without padding.
        """
        ...
