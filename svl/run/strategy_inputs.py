"""What a strategy is handed (statistics, the number of layers that go, a probe), and the origin of its plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.config import asked_removals
from svl.core import Plan, RemovalProbe, Rescoring, Stats, checked_plan, fitted_patch
from svl.core.contract import answering
from svl.run import early_checks
from svl.run.generated import read_texts
from svl.run.keys import method_identity, stage_code
from svl.run.stages import make_stage
from svl.text.progress import show_progress

if TYPE_CHECKING:
    from svl.run.setup import RunSetup
    from svl.store.artifacts import Entry


def read_statistics(setup: RunSetup, stats: Entry | None) -> Stats:
    """The calibration seen through the selector; without one, the bare depth of the model."""
    kinds: tuple[int | None, ...] = ()
    if "probe" in setup.probes:  # which holds the model anyway
        from svl.pruning.folding import merge_kinds

        kinds = merge_kinds(setup.dense.anatomy, setup.dense.layers)
    if stats is None:
        anatomy = setup.dense.anatomy
        return Stats(anatomy.n_layers, anatomy.removable, kinds=kinds)
    from svl.calibration.calibrate import TraceFolder

    removable = tuple(stats.output["removable"])
    return Stats(stats.output["n_layers"], removable, TraceFolder(stats.path), setup.selector, kinds=kinds)


def count_removals(setup: RunSetup, stats: Stats) -> int:
    """How many layers go: `n_remove`, or the ratio of the model's depth.

    Raises:
        SvlError: if that many may not be removed.
    """
    n = asked_removals(setup.cfg, stats.n_layers)
    stats.candidates(n)
    return n


def check_choices(setup: RunSetup) -> None:
    """Find out, before anything is measured, what of strategy and compensation cannot be on this model.

    A strategy that needs no measurement has its plan now.

    Raises:
        SvlError: if there is such a thing.
    """
    stats = read_statistics(setup, None)
    n_remove = count_removals(setup, stats)
    with answering(setup.strategy):
        setup.strategy.check(stats, n_remove)
    if not setup.strategy.needs:
        plan = checked_plan(setup.strategy, stats, n_remove)
        setup.dense.anatomy.check_plan(plan, setup.name)
        early_checks.check_plan(setup, plan)
        early_checks.check_single_writers(setup, plan)
        if plan.removed and not setup.compensation.needs:  # what it does needs no measurement, either
            early_checks.check_patch_fits(setup, plan, fitted_patch(setup.compensation, None, plan))  # type: ignore[arg-type]


def resumable_probe(setup: RunSetup) -> RemovalProbe:
    """The dense model to try removals on; whatever it measures is kept in the store, so that searches resume."""
    from svl.calibration.removal_probe import ModelProbe

    shared = {"model": setup.model, "code": stage_code("probe"), "losses": setup.losses_on}
    samples = setup.samples if setup.losses_on else None
    return ModelProbe(setup.dense, samples, remember=_remembering(setup, shared), show=show_progress)


def resumable_rescoring(
    setup: RunSetup, stats: Entry | None, texts: Entry | None, probe: RemovalProbe | None
) -> Rescoring:
    """What is left of the model after removals; each step is kept in the store, so that searches resume."""
    from svl.calibration.activations import Activations
    from svl.calibration.rescoring import ModelRescoring

    seen = dataclasses.replace(read_statistics(setup, stats), probe=probe)
    batch_size = setup.cfg.calibration.batch_size
    hidden = Activations(setup.dense, setup.samples, seen, batch_size, show_progress, read_texts(texts))
    shared = {
        "model": setup.model,
        **rescoring_inputs(setup, stats, texts),
        "strategy": method_identity(setup.strategy),
    }
    return ModelRescoring(hidden, setup.compensation, _remembering(setup, shared))


def rescoring_inputs(setup: RunSetup, stats: Entry | None, texts: Entry | None) -> dict[str, Any]:
    """What measuring again depends on, beside the model and the strategy."""
    return {
        "code": stage_code("rescoring"),
        "stats": stats and stats.key,
        "selector": method_identity(setup.selector),
        "compensation": method_identity(setup.compensation),
        "examples": [setup.samples.fingerprint, setup.samples.answers],
        "protect": setup.options.protect,
        **({"texts": texts.key} if texts else {}),
    }


def _remembering(setup: RunSetup, shared: dict[str, Any]) -> Callable[[str, dict[str, Any], Callable[[], Any]], Any]:
    """Keeps values in the store, under what they depend on: `shared` and their own inputs."""

    def remember(what: str, inputs: dict[str, Any], compute: Callable[[], Any]) -> Any:
        def build(folder: Path) -> dict[str, Any]:
            return {"value": compute()}

        # Within stage `plan`, which all processes make.
        entry = make_stage(setup, "probe", {**shared, "what": what, **inputs}, build, help=lambda _: compute())
        return entry.output["value"]

    return remember


def describe_origin(setup: RunSetup, plan: Plan, n_remove: int, stats: Entry | None) -> dict[str, Any]:
    """The provenance of a plan: ratio, model and data, and the layers that were protected.

    `ratio` is what was asked for, where the strategy did as it was asked, else `removed_share`: the fraction of the
    sub-layers that are gone, with both of every removed layer.
    """
    n_sublayers = 2 * len(plan.removed) + len(plan.sublayers)
    share = n_sublayers / (2 * plan.n_layers)
    asked = setup.cfg.ratio if setup.cfg.n_remove is None else n_remove / plan.n_layers
    provenance = {
        **plan.provenance,
        "ratio": asked if n_sublayers == n_remove * setup.strategy.sublayers_for_one else share,
        "removed_share": share,
        "n_remove": len(plan.removed),
        "model_fingerprint": setup.fingerprint,
        "calibration": setup.samples.fingerprint if stats or setup.losses_on or setup.rescores else None,
    }
    protected = stats.output["protected"] if stats else setup.dense.anatomy.protected
    if protected:
        provenance["protected"] = {str(layer): reason for layer, reason in protected.items()}
    return provenance
