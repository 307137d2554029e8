"""Refit: every kept layer behind a removal learns, in closed form, to give what the dense model would pass on.

Going up from the kept layer before the first removed one, on the states of the already pruned and refitted model, the
down_proj of layer i, and then its o_proj, becomes W + D, where D minimises over tokens

    sum_t |g_t - D x_t|^2 / |h_t|^2 + ridge |D|^2,    g_t = h_t - h'_t.

x_t is what the projection reads, h'_t what the layer gives out so far, h_t what the dense model passes to the next kept
layer. So the layer before a gap bridges it, and the layers behind it correct what is left of the error and of their own
reaction to it, with all the freedom of their weights and not of a d x d map of their outputs. Relative errors keep
massive activations from ruling the fit; the ridge pulls towards the model as it is. For each projection it is the one,
of `ridges`, that does best on every `fold`-th sample after a fit on the others; the final fit is on all of them. That
o_proj also moves what the MLP of its layer reads is left to the layers above. A projection of which the layer adds what
it writes for some tokens only (an MLP of Mllama's cross-attention layers) stays as it is.

With texts that the dense model generates (`calibration.generated`), what is fitted to the calibration set need not be
paid for elsewhere: given samples and texts weigh the same, row for row, and the ridge is the one whose worse share of
the gap left, of the two, is least on what is held out. An infinite ridge leaves the projection as it is.

This is ours; see experiments/baselines for how it compares with SCP and with ReplaceMe's map.

Cost: about four passes over the calibration set, two hidden states per token in memory, and for each layer n_in^3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svl.compensation.regression import HeldOutRegression, check_ridges
from svl.compensation.run_rows import check_rows, targets_left
from svl.core import (
    Compensation,
    HiddenStates,
    LayerStep,
    Patch,
    Plan,
    SvlError,
    Update,
    check_count,
    check_targets,
    one_of,
)


@dataclass(frozen=True)
class Refit(Compensation):
    """Sequential ridge regression of kept layers.

    Attributes:
        ridges: candidates, relative to the mean squared norm of a coordinate of x; one alone is taken as it is.
            Infinity: no change.
        fold: which share of the samples chooses the ridge: one in so many.
        targets: projections that are refitted: "mlp" (down_proj), "attn" (o_proj), or both in this order; the second
            one of a layer is fitted to what the first leaves.
        layers: all (kept ones from the first gap on) | gaps (only those before a removed run).
        rows: selected (tokens weighted by the selector) | all.
        texts: how many texts of the dense model's own it is fitted to, too, unless `calibration.generated` says.
    """

    ridges: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    fold: int = 5
    targets: tuple[str, ...] = ("mlp", "attn")
    layers: str = "all"
    rows: str = "all"
    texts: int = 0
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})
    in_memory: ClassVar[bool] = True

    def __post_init__(self) -> None:
        one_of("compensation.layers", self.layers, ("all", "gaps"))
        check_targets("compensation.targets", self.targets)
        check_rows(self.rows)
        check_ridges(self.ridges, self.fold)
        check_count("compensation.texts", self.texts)

    @property
    def own_texts(self) -> int:
        """See `Compensation`."""
        return self.texts

    def refitted(self, plan: Plan) -> list[tuple[int, str]]:
        """The projections that are refitted, in the order in which they are."""
        if not plan.removed:
            return []
        layers = [i for i in plan.kept if i >= plan.removed[0] - 1]
        if self.layers == "gaps":
            layers = [start - 1 for start, _ in plan.runs_with_layer_before]
        return [(layer, writer) for layer in layers for writer in targets_left(plan, layer, self.targets)]

    def fit(self, hidden: HiddenStates, plan: Plan) -> Patch:
        """The change of every refitted down_proj; its notes name the ridges and the share of the gap that is left.

        Raises:
            SvlError: if the model lacks the projection, its layers cannot be run one by one, or no token is selected.
        """
        for target in self.targets:
            one_of("compensation.targets for this model", target, tuple(hidden.writers))
        if not plan.removed:
            return Patch()
        refitted, updates, notes = self.refitted(plan), {}, []
        for _, writer in refitted:
            one_of("compensation.targets for this model", writer, tuple(hidden.writers))
        unlike = [one for one in refitted if hidden.stream_factor(*one) is None]
        if refitted and len(unlike) == len(refitted):
            raise SvlError("no projection adds to the residual stream what it writes, so none can be refitted")
        for step in hidden.walk(plan):
            for writer in [writer for layer, writer in refitted if layer == step.layer]:
                if (step.layer, writer) in unlike:
                    notes.append(f"layer {step.layer} {writer}: left as it is, as not all that it writes is added")
                    continue
                change, note = self._refit(step, writer)
                notes.append(f"layer {step.layer} {writer}: {note}")
                if not bool(change.any()):
                    continue
                delta = change.mT.float().contiguous()
                updates[step.layer, writer] = Update(weight=step.change(writer, delta).cpu())
        return Patch(updates, notes=tuple(notes))

    def _refit(self, step: LayerStep, writer: str) -> tuple[Tensor, str]:
        """D^T [n_in, d] of one projection, and a note on its fit."""
        regression = HeldOutRegression(self.ridges, self.fold)
        for rows in step.rows(writer):
            weights = torch.ones_like(rows.weights) if self.rows == "all" else rows.weights
            relative = weights.to(rows.wanted.device) / rows.wanted.square().sum(-1).clamp(min=1e-30)
            regression.add_sample(rows.read, rows.wanted - rows.given, relative, rows.generated)
        return regression.solve()
