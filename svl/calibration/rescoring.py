"""The model measured again after removals: what is left of it, compensated, is calibrated as the dense one was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from svl.calibration.activations import Activations
from svl.calibration.calibrate import calibrate, select
from svl.calibration.removal_probe import ModelProbe, Remember, compute_anew
from svl.calibration.row_count import counted_rows
from svl.core import Compensation, Patch, Plan, Stats, Strategy, SvlError, checked_plan, extended_patch, fitted_patch
from svl.core.methods import STATISTICS
from svl.core.patch import NO_TRIALS
from svl.pruning import surgery


@dataclass
class ModelRescoring:
    """`core.Rescoring` on a model and a calibration set.

    Attributes:
        hidden: the dense model's states; its statistics are those that the first layer is chosen by, with the probe.
        compensation: what makes up for removed layers.
        remember: as of `ModelProbe`.
    """

    hidden: Activations
    compensation: Compensation
    remember: Remember = compute_anew
    _patches: dict[tuple[int, ...], Patch] = field(default_factory=dict)

    def next_removal(self, strategy: Strategy, removed: Sequence[int]) -> tuple[int, dict[int, float], float]:
        """See `core.Rescoring`.

        Raises:
            SvlError: if the strategy gives something else than a layer, or tries removals out on a model with maps at
                its cuts.
        """
        if "probe" in strategy.needs and not self.compensation.foldable:
            raise SvlError(NO_TRIALS)
        order = tuple(removed)

        def compute() -> dict[str, Any]:
            with counted_rows() as count:
                stats = self._statistics(strategy, order) if order else self.hidden.stats
                plan = checked_plan(strategy, stats, 1)
            if plan.merges or plan.sublayers or len(plan.removed) != 1:
                raise SvlError(f"strategy {type(strategy).__name__} cannot be asked for one layer after another")
            passes = count.rows / (self.hidden.n_layers * len(self.hidden.samples))
            return {"removed": plan.removed[0], "importance": plan.importance, "passes": passes}

        found = self.remember("next removal", {"removed": order}, compute)
        kept = [i for i in range(self.hidden.n_layers) if i not in order]
        values = found["importance"]
        importance = dict(zip(kept, values, strict=True)) if values else {}  # a strategy may give none
        return kept[found["removed"]], importance, found["passes"]

    def _statistics(self, strategy: Strategy, order: tuple[int, ...]) -> Stats:
        """What `strategy` needs to know of the model without the layers that are gone."""
        hidden = self.hidden
        plan = Plan(hidden.n_layers, order, order=order)
        pruned = surgery.apply(hidden.lvlm, plan, self._patch(plan))
        stats = Stats(pruned.anatomy.n_layers, pruned.anatomy.removable, gone=plan.removed)
        selector = hidden.stats.selector
        if selector and strategy.needs.intersection(STATISTICS):
            wanted = [name for name in STATISTICS if name in strategy.needs | selector.needs]
            measured = calibrate(
                pruned, hidden.samples, statistics=wanted, batch_size=hidden.batch_size, show=hidden.show
            )
            traces = [replace(trace, gone=plan.removed) for trace in measured.traces]
            stats = select(replace(stats, traces=traces), selector)
        if strategy.needs & {"probe", "weights"}:
            samples = hidden.samples if "probe" in strategy.needs else None
            stats = replace(stats, probe=ModelProbe(pruned, samples, show=hidden.show))
        return stats

    def _patch(self, plan: Plan) -> Patch:
        """What makes up for the layers that are gone, from that of the step before where it is known."""
        hidden: Any = self.hidden
        before = self._patches.get(plan.order[:-1])
        if before is None:
            patch = fitted_patch(self.compensation, hidden, plan)
        else:
            patch = extended_patch(self.compensation, hidden, plan, before)
        self._patches = {plan.order: patch}
        return patch
