"""The best channels of two neighbours become one layer (CoMe, arXiv 2510.15304, without its distillation).

A removed layer m is joined with the kept layer l before it, one removal after another (in the plan's order, else
upwards), measured on the model as joined so far:

* BI of either layer is the sum over tokens of 1 - cos of what enters and what leaves it, a negative cosine counting
  as 0; its ratio r is its part of the sum of both.
* MLP channels: c counts as mean_t |a_c| * sum of |W_down[:, c]|, with a what down_proj reads. Of either layer the best
  floor(d_ff r) stay, the layer of larger r has the rest.
* Heads go by key-value group, in the same way, by the mean of mean_t |a_d| * sum of |W_o[:, d]| over the group's
  dimensions d, a being what o_proj reads.
* Input and post-attention norms become the mean of both, output biases and norms of queries and keys the sum by r. What
  else lies on the axis of channels or heads (a norm before down_proj or o_proj) is chosen with them.

As released, the query heads that stay are chosen by tiling the mask of groups over the heads, which with grouped-query
attention are not those of the groups that stay; `heads` says which. Layers of other parts than q, k, v, o and a (gated)
MLP are refused, and those in which the order of channels and heads matters (tried before calibration).

Cost: one pass over the calibration set for each removed layer, up to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from svl.compensation.run_rows import check_whole_before_runs
from svl.core import ROLES, Compensation, HiddenStates, JoinedPart, Patch, Plan, SvlError, one_of


@dataclass(frozen=True)
class Importance:
    """What a layer has to offer: its Block Influence, and how much every MLP channel and dimension of heads counts."""

    influence: float
    channels: Tensor  # fp64 [d_ff]
    dimensions: Tensor  # fp64 [query heads * size of a head]


@dataclass(frozen=True)
class Come(Compensation):
    """Concatenation of two layers.

    Attributes:
        heads: grouped (query heads stay with their key-value heads) | released.
    """

    heads: str = "grouped"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    joins: ClassVar[bool] = True
    in_memory: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("compensation.heads", self.heads, ("grouped", "released"))

    def check_plan(self, plan: Plan) -> None:
        """Raise SvlError if a layer that another one would join has lost its attention or MLP."""
        check_whole_before_runs(plan, "come")

    def fit(self, hidden: HiddenStates, plan: Plan) -> Patch:
        """Kept layers as parts of layers of the dense model; notes name the ratios.

        Raises:
            SvlError: if the model lacks a projection, states are not finite, or as `check_plan` says.
        """
        self.check_plan(plan)
        for role in ROLES:
            one_of("the writer that compensation needs", role, tuple(hidden.writers))
        order, patch = plan.order or plan.removed, Patch()
        for n in range(1, len(order) + 1):
            patch = self.extend(hidden, plan.with_layers(order[:n], order[:n]), patch)
        return patch

    def extend(self, hidden: HiddenStates, plan: Plan, patch: Patch) -> Patch:
        """The last layer in the order of the plan, joined with the one before it."""
        *earlier, gone = plan.order
        before = plan.with_layers(earlier)
        below = [i for i in before.kept if i < gone]
        if not below:
            joins = {layer: parts for layer, parts in patch.joins.items() if layer != gone}
            return Patch(joins=joins, notes=(*patch.notes, f"layer {gone}: no layer is before it, so it is not joined"))
        pair = (below[-1], gone)
        current = {layer: patch.joins.get(layer) or (_whole(hidden, layer),) for layer in pair}
        found = self._measure(hidden, before, patch, current)
        total = sum(importance.influence for importance in found.values())
        if not 0 < total < float("inf"):
            raise SvlError("hidden states are not finite, or no layer changes them; choose another model.dtype")
        joined: list[JoinedPart] = []
        shares = {layer: importance.influence / total for layer, importance in found.items()}
        smaller = min(pair[::-1], key=shares.__getitem__)
        for layer in pair:
            chosen = self._choose(found[layer], shares[smaller], layer != smaller, hidden.heads)
            joined += _restricted(current[layer], chosen, shares[layer])
        joins = {layer: parts for layer, parts in patch.joins.items() if layer != gone} | {pair[0]: tuple(joined)}
        note = f"layer {gone} joins layer {pair[0]}, with {shares[gone]:.0%} of its channels"
        return Patch(joins=joins, notes=(*patch.notes, note))

    def _measure(
        self, hidden: HiddenStates, plan: Plan, patch: Patch, layers: dict[int, tuple[JoinedPart, ...]]
    ) -> dict[int, Importance]:
        """One pass through what `plan` and `patch` leave."""
        influence = dict.fromkeys(layers, 0.0)
        activity = {(layer, role): torch.zeros((), dtype=torch.float64) for layer in layers for role in ROLES}
        points = sorted({i for layer in layers for i in (layer, layer + 1)})
        for sample in hidden.stream(points, list(activity), plan, patch):
            for layer in layers:
                similar = F.cosine_similarity(sample.h(layer), sample.h(layer + 1), dim=-1)
                influence[layer] += float((1 - similar.clamp(0, 1)).double().sum())
            for layer, role in activity:
                read = sample.read(layer, role).double().abs().sum(0)
                activity[layer, role] = activity[layer, role].to(read.device) + read
        found = {}
        for layer, parts in layers.items():
            sizes = {role: _column_sizes(hidden, role, parts) for role in ROLES}
            counts = {role: activity[layer, role].cpu() * sizes[role] for role in ROLES}
            found[layer] = Importance(influence[layer], counts["mlp"], counts["attn"])
        return found

    def _choose(
        self, importance: Importance, share: float, takes_rest: bool, heads: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The channels, query heads and key-value heads of a layer that stay, ascending."""
        queries, groups = heads
        channels = _best(importance.channels, share, takes_rest)
        kept = _best(importance.dimensions.reshape(groups, -1).mean(1), share, takes_rest)
        owners = torch.arange(queries) // (queries // groups)
        if self.heads == "released":
            owners = torch.arange(queries) % groups
        return channels, torch.isin(owners, kept).nonzero()[:, 0], kept


def _best(values: Tensor, share: float, takes_rest: bool) -> Tensor:
    """Indices of the largest of n values, ascending: floor(n share) of them, or as many as that leaves."""
    n = len(values)
    count = n - int(n * share) if takes_rest else int(n * share)
    return values.topk(count).indices.sort().values


def _whole(hidden: HiddenStates, layer: int) -> JoinedPart:
    """A layer as it is."""
    channels = torch.arange(len(hidden.column_sizes(layer, "mlp")))
    queries, groups = hidden.heads
    return JoinedPart(layer, 1.0, 1.0, channels, torch.arange(queries), torch.arange(groups))


def _column_sizes(hidden: HiddenStates, role: str, parts: tuple[JoinedPart, ...]) -> Tensor:
    """`hidden.column_sizes` of a layer that consists of these parts."""
    sizes = []
    for part in parts:
        columns = hidden.column_sizes(part.layer, role).cpu()
        if role == "mlp":
            sizes.append(columns[part.channels])
        else:
            sizes.append(columns.reshape(hidden.heads[0], -1)[part.queries].flatten())
    return torch.cat(sizes)


def _restricted(parts: tuple[JoinedPart, ...], chosen: tuple[Tensor, Tensor, Tensor], share: float) -> list[JoinedPart]:
    """What is left of a layer's parts: of all its channels, query and key-value heads in a row, the `chosen` ones."""
    result, names = [], ("channels", "queries", "groups")
    begin = dict.fromkeys(names, 0)
    for part in parts:
        left = {}
        for name, kept in zip(names, chosen, strict=True):
            own = getattr(part, name)
            places = kept - begin[name]
            left[name] = own[places[(places >= 0) & (places < len(own))]]
            begin[name] += len(own)
        result.append(replace(part, norm=part.norm / 2, share=part.share * share, **left))
    return result
