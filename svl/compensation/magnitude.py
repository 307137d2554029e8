"""Magnitude compensation (Prune&Comp, arXiv 2507.18212): one factor per gap for the size of the residual stream.

A removed run [s, e) would have made the stream larger. The paper estimates by how much,

    alpha = mean over channels k, mean over samples, of (mean_t |h_e[t, k]|) / (mean_t |h_s[t, k]|),

and multiplies all that is written before the gap: the embeddings, and o_proj and down_proj of the layers before it.
Here, what is written behind the gap is divided by alpha instead: o_proj and down_proj, with their biases, of every
kept layer from e on. From the gap on, the stream is then smaller by alpha than the paper's, which the norms before
every later layer and before the head take out again: both models compute the same, up to the epsilon of the norms.
Embeddings stay as they are, and with them heads that are tied to them, projectors and visual features. Factors of
several gaps multiply. A run at the end of the decoder has nothing behind it; there, the paper's factor has no effect
either.

In the paper, layers go one by one, each factor measured on the model compensated so far. Of a plan with an order
(`strategy=iterative`), factors are measured so, one for each layer. Of any other plan they are measured on the dense
model, one for each run, as the released code does for one block (CosSim_CL). Neither covers models that normalise what
projections write, or that add visual features behind a gap (DeepStack).

Cost: one more pass over the calibration set, up to the deepest removed layer; of a plan with an order, one for each
layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svl.compensation.run_rows import check_rows
from svl.core import ROLES, Compensation, HiddenStates, Patch, Plan, SvlError, Update, one_of


@dataclass(frozen=True)
class Magnitude(Compensation):
    """One factor per removed run, or per removed layer of a plan with an order.

    Attributes:
        rows: all (the paper's) | selected (tokens weighted by the selector; samples without any are left out).
    """

    rows: str = "all"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    only_scales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_rows(self.rows)

    def fit(self, hidden: HiddenStates, plan: Plan) -> Patch:
        """Factors of what kept layers behind a gap write; notes name alpha of every run.

        Raises:
            SvlError: if the model lacks a projection, the selector leaves no token, or alpha is no positive number.
        """
        for role in ROLES:
            one_of("the writer that compensation needs", role, tuple(hidden.writers))
        patch = Patch()
        for n in range(1, len(plan.order) + 1):
            patch = self.extend(hidden, plan.with_layers(plan.order[:n], plan.order[:n]), patch)
        if plan.order:
            return patch
        runs = [(start, stop) for start, stop in plan.runs if stop < plan.n_layers]
        notes = [] if len(runs) == len(plan.runs) else ["no layer behind the last one: its run needs no factor"]
        if not runs:
            return Patch(notes=tuple(notes))
        alphas = self._alphas(hidden, runs, plan.with_layers(()), Patch())
        notes += [f"layers {start}..{stop - 1}: alpha {alpha:.4f}" for (start, stop), alpha in alphas.items()]
        updates: dict[tuple[int, str], Update] = {}
        for (_, stop), alpha in alphas.items():
            updates = _divided(updates, plan, stop, alpha)
        return Patch(updates, notes=tuple(notes))

    def extend(self, hidden: HiddenStates, plan: Plan, patch: Patch) -> Patch:
        """The factor of the last layer in the order of the plan, measured on the model without those before it."""
        *earlier, layer = plan.order
        before = plan.with_layers(earlier)
        if layer == before.kept[-1]:
            note = f"layer {layer}: nothing is behind it, so it needs no factor"
            return Patch(_divided(patch.updates, plan, plan.n_layers, 1.0), notes=(*patch.notes, note))
        (alpha,) = self._alphas(hidden, [(layer, layer + 1)], before, patch).values()
        updates = _divided(patch.updates, plan, layer + 1, alpha)
        return Patch(updates, notes=(*patch.notes, f"layer {layer}: alpha {alpha:.4f}"))

    def _alphas(
        self, hidden: HiddenStates, runs: list[tuple[int, int]], plan: Plan, patch: Patch
    ) -> dict[tuple[int, int], float]:
        """alpha of every run, from one pass over the calibration set through what `plan` and `patch` leave."""
        ratios: dict[tuple[int, int], list[Tensor]] = {run: [] for run in runs}
        for sample in hidden.stream(sorted({i for run in runs for i in run}), plan=plan, patch=patch):
            for start, stop in runs:
                weights = sample.weights[start].double()
                if self.rows == "all":
                    weights = torch.ones_like(weights)
                if float(weights.sum()) > 0:
                    before, after = (weights @ sample.h(i).double().abs() for i in (start, stop))
                    ratios[start, stop].append((after / before).mean())
        alphas = {}
        for (start, stop), parts in ratios.items():
            if not parts:
                raise SvlError("the selector leaves no token for compensation; choose another selector, or rows=all")
            alpha = float(torch.stack(parts).mean())
            if not 0 < alpha < float("inf"):
                raise SvlError(
                    f"across layers {start}..{stop - 1}, the stream grows by a factor of {alpha:g}: a channel is 0 "
                    "before them, or states are not finite; choose another compensation, or another model.dtype"
                )
            alphas[start, stop] = alpha
        return alphas


def _divided(
    updates: dict[tuple[int, str], Update], plan: Plan, stop: int, alpha: float
) -> dict[tuple[int, str], Update]:
    """Factors of the layers that `plan` keeps: those of `updates`, from layer `stop` on divided by `alpha`."""
    divided = {}
    for key in [(layer, role) for layer in plan.kept for role in ROLES if (layer, role) not in plan.sublayers]:
        scale = updates[key].scale if key in updates else 1.0
        if scale is not None and (key in updates or key[0] >= stop):
            divided[key] = Update(scale=scale / alpha if key[0] >= stop else scale)
    return divided
