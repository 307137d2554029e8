"""What a compensation changes: plain data, applied by the surgeon or, where it folds into weights, on export."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


# Why a patch with maps, and a compensation that gives them, is not exported.
NO_STOCK_FORM = (
    "a map at a cut acts on the residual stream between two layers, which no stock checkpoint can express; evaluate it "
    "in memory (evaluator=transformers, no export), or choose a compensation that folds into weights"
)
# Why further removals are not tried on a model that has them.
NO_TRIALS = (
    "removals cannot be tried out on a model with maps at its cuts, which were fitted to these; choose a strategy that "
    "reads statistics, or a compensation that folds into weights"
)


@dataclass(frozen=True)
class Update:
    """The change of one residual-writing projection: W <- scale (W + left @ right @ W + delta), and so for its bias.

    `left` [d, k] and `right` [k, d] (the identity where None) act on what the projection writes, whatever its input:
    they apply to every matrix of the writer (experts, too). `delta` [d, n_in] needs a writer of one matrix; `shift`
    [d] is added to the bias and needs one. `scale` comes last, for every matrix and bias of the writer. `weight`
    [d, n_in], in the model's dtype, stands in for W, of a writer of one matrix: in half precision it is half as large
    as the fp32 change that led to it, and exact. Parts that are None change nothing.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    delta: Tensor | None = None
    shift: Tensor | None = None
    scale: float | None = None
    weight: Tensor | None = None


@dataclass(frozen=True)
class JoinedPart:
    """What a joined layer takes over from one layer of the dense model.

    Attributes:
        layer: of the dense model.
        norm: its coefficient in the sum that norms become.
        share: its coefficient in the sum that output biases and norms of queries and keys become.
        channels: int64, those of its MLP: rows of what reads into it, columns of what writes.
        queries: int64, those of its query heads: rows of q_proj, columns of o_proj.
        groups: int64, those of its key-value heads: rows of k_proj and v_proj.
    """

    layer: int
    norm: float
    share: float
    channels: Tensor
    queries: Tensor
    groups: Tensor


@dataclass(frozen=True)
class TensorChange:
    """What training made of one tensor: all of its `value`, or a change of rank k, W + left @ right.

    Either `value`, in the tensor's shape, or `left` [d_out, k] and `right` [k, d_in], which change a matrix.
    """

    value: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None


@dataclass(frozen=True)
class Patch:
    """What a compensation changes: updates and blends fold into kept weights, maps do not. Layers are original indices.

    Attributes:
        updates: by (layer, writer). A writer is a role of the layer's residual-writing projections: "attn" (o_proj)
            or "mlp" (down_proj).
        blends: layer -> {source layer: coefficient}: every projection (weight and bias, not the norms) of the layer
            becomes this sum over layers of the dense model, before any update.
        joins: layer -> the parts, in order, that all of its tensors are put together from; of the dense model's width.
        trained: name of a parameter of the dense model -> what recovery made of it, after all else.
        maps: first layer of a removed run -> W [d, d]: in place of the run, a token's residual stream h becomes W h.
            What is behind the run reads W h, but the stream also carries it on, so that no change of later weights
            does the same: such a patch works in memory only.
        notes: what a reader of the results should know.
        spectra: layer -> singular values, descending, of the matrix whose directions its update is made of, where there
            is one; told to the reader only.
    """

    updates: dict[tuple[int, str], Update] = field(default_factory=dict)
    blends: dict[int, dict[int, float]] = field(default_factory=dict)
    maps: dict[int, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    spectra: dict[int, tuple[float, ...]] = field(default_factory=dict)
    joins: dict[int, tuple[JoinedPart, ...]] = field(default_factory=dict)
    trained: dict[str, TensorChange] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.updates or self.blends or self.joins or self.maps or self.trained)
