"""What can be found wrong with methods and a model before the stage that it would waste."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from svl.config import asked_removals
from svl.core import Patch, Plan, SvlError
from svl.core.contract import answering

if TYPE_CHECKING:
    from svl.recovery.base import Recovery
    from svl.run.setup import RunSetup

log = logging.getLogger(__name__)


def check_compensation(setup: RunSetup) -> None:
    """Check that the compensation can be folded into the model's layers, and can join them, if it does.

    Raises:
        SvlError: if it cannot.
    """
    compensation = setup.compensation
    if not compensation.needs or not compensation.foldable or "layers" in setup.tried:
        return
    from svl.pruning import folding, layer_trials

    folding.check_single_somewhere(compensation, setup.dense.anatomy)
    layer_trials.check_folding(setup.dense, only_scales=compensation.only_scales)
    if compensation.joins:
        layer_trials.check_joining(setup.dense)
    setup.tried.add("layers")


def check_single_writers(setup: RunSetup, plan: Plan) -> None:
    """Raise SvlError if the compensation needs single matrices where the plan leaves it experts."""
    if setup.compensation.refitted(plan):
        from svl.pruning import folding

        folding.check_single(setup.compensation, plan, setup.dense.anatomy)


def check_recovery(setup: RunSetup, plan: Plan | None = None) -> None:
    """Check that recovery can train this model, and finds what it trains; costs no pass through the model.

    Before there is a plan, the first layers that may go are taken for those that will; if none are asked for, or the
    plan is empty, nothing is trained.

    Raises:
        SvlError: if it cannot.
    """
    recovery = setup.recovery
    if not setup.recovers or "recovery" in setup.tried:
        return
    from svl.pruning import surgery
    from svl.recovery import contract, student, training

    anatomy = setup.dense.anatomy
    if plan is None:
        plan = Plan(anatomy.n_layers, tuple(anatomy.removable[: asked_removals(setup.cfg, anatomy.n_layers)]))
    if plan.is_empty:
        return
    student.check_trainable(setup.dense, recovery)
    pruned = surgery.apply(setup.dense, plan)
    parts = contract.checked_parts(recovery, pruned, plan)
    student.check_mergeable(setup.dense, pruned, plan, parts)
    training.check_pictures(pruned, parts, setup.training_samples)
    setup.tried.add("recovery")


def tell_idle_settings(recovery: Recovery) -> None:
    """Warn of settings of a recovery that trains nothing: the method was probably forgotten."""
    if not recovery.does_nothing:
        return
    given, default = dataclasses.asdict(recovery), dataclasses.asdict(type(recovery)())
    if idle := [name for name in given if given[name] != default[name]]:
        choose = "choose a method (svl list recovery)"
        log.warning("recovery.%s has no effect: recovery=none trains nothing; %s", idle[0], choose)


def check_patch_fits(setup: RunSetup, plan: Plan, patch: Patch) -> None:
    """Raise SvlError unless a compensation's patch fits the model, before anything is evaluated or exported."""
    from svl.pruning import folding

    folding.check_patch_for_model(patch, plan, setup.dense.anatomy, setup.dense.layers)


def check_plan(setup: RunSetup, plan: Plan) -> None:
    """Raise SvlError if the compensation, or what pruning is combined with, can do nothing with what a plan leaves."""
    compensation = setup.compensation
    if plan.removed:
        with answering(compensation):
            compensation.check_plan(plan)
    if plan.removed and plan.sublayers and compensation.needs and setup.cfg.model.offload:
        raise SvlError(
            "a compensation is fitted to the model without the plan's sub-layers, which must be in memory for it, but "
            "model.offload leaves layers on disk: set compensation=none, or model.offload=false"
        )
    if "visual_tokens" in setup.combined:
        setup.combined["visual_tokens"].check_plan(plan)


def tell_zeros(names: Sequence[str]) -> None:
    """Log which removed sub-layers are still computed in memory."""
    if names:
        log.info(
            "  %s: zeros are written in memory, and the cost is what it was, as other layers or the cache depend on "
            "the block, or it is of a kind that cannot be left out",
            ", ".join(names),
        )
