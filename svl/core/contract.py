"""What methods must answer, checked where they are asked: a plug-in's mistake is one line that names it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from svl.core.errors import SvlError, explained
from svl.core.patch import Patch, Update
from svl.core.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from svl.core.methods import Compensation, HiddenStates, Method, Strategy, TokenSelector
    from svl.core.stats import Stats, TokenTrace


def method_name(method: object) -> str:
    """Module and class of a method, as `_target_` has them."""
    return f"{type(method).__module__}.{type(method).__qualname__}"


@contextmanager
def answering(method: Method) -> Iterator[None]:
    """Within the block a method is asked; errors of one that is not svl's own begin with its name."""
    try:
        yield
    except SvlError as error:
        if method_name(method).startswith("svl."):
            raise
        raise SvlError(f"{method_name(method)}: {error}") from error


def check_stepwise(setting: str, strategy: Strategy) -> None:
    """Raise SvlError unless a strategy, which `setting` names, can be asked for one layer after another."""
    if not strategy.stepwise:
        name = type(strategy).__name__
        raise SvlError(f"{setting} is {name}, which cannot be asked for one layer after another")


def checked_weights(selector: TokenSelector, trace: TokenTrace, n_layers: int) -> Tensor:
    """`selector.weights(trace)`: [T] or [L, T].

    Raises:
        SvlError: if it is no tensor of one of these shapes, on the CPU, with values from 0 to 1.
    """
    import torch  # not above: the command line starts without it

    with answering(selector):
        weights, n_tokens = selector.weights(trace), len(trace.visual)
    who = f"selector {method_name(selector)}"
    if not isinstance(weights, torch.Tensor):
        raise SvlError(f"{who} gives {type(weights).__name__} as weights, but must give a tensor")
    if tuple(weights.shape) not in ((n_tokens,), (n_layers, n_tokens)):
        shapes = f"[{n_tokens}] or [{n_layers}, {n_tokens}]"
        raise SvlError(f"{who} gives weights of shape {list(weights.shape)}, but must give {shapes}")
    if weights.device.type != "cpu" or weights.is_complex():
        raise SvlError(f"{who} gives {weights.dtype} weights on {weights.device}, but must give numbers on the CPU")
    if not bool(((weights >= 0) & (weights <= 1)).all()):  # NaN is neither
        raise SvlError(f"{who} gives weights outside [0, 1]")
    return weights


def checked_plan(strategy: Strategy, stats: Stats, n_remove: int) -> Plan:
    """`strategy.plan(stats, n_remove)`.

    Raises:
        SvlError: if it is no plan for this model, or removes protected layers.
    """
    with answering(strategy):
        plan = strategy.plan(stats, n_remove)
    who = f"strategy {method_name(strategy)}"
    if not isinstance(plan, Plan):
        raise SvlError(f"{who} gives {type(plan).__name__}, but must give a Plan")
    if plan.n_layers != stats.n_layers:
        raise SvlError(f"{who} gives a plan for {plan.n_layers} layers, but the model has {stats.n_layers}")
    if forbidden := sorted(set(plan.removed) - set(stats.removable)):
        raise SvlError(f"{who} removes layers {forbidden}, which are protected; layers {list(stats.removable)} may go")
    return plan


def fitted_patch(compensation: Compensation, hidden: HiddenStates, plan: Plan) -> Patch:
    """`compensation.fit(hidden, plan)`, checked; `hidden` may be None for one that does not need it.

    Raises:
        SvlError: if it is no patch for this plan.
    """
    with answering(compensation):
        patch = compensation.fit(hidden, plan)
    return checked_patch(compensation, patch, plan)


def extended_patch(compensation: Compensation, hidden: HiddenStates, plan: Plan, patch: Patch) -> Patch:
    """`compensation.extend(hidden, plan, patch)`, checked as `fitted_patch` is."""
    with answering(compensation):
        extended = compensation.extend(hidden, plan, patch)
    return checked_patch(compensation, extended, plan)


def checked_patch(compensation: Compensation, patch: Patch, plan: Plan) -> Patch:
    """The patch that a compensation gave for a plan; whether it fits the weights is checked where it is applied.

    Raises:
        SvlError: if it is no patch, changes layers that are removed, or has numbers that are not finite.
    """
    who = f"compensation {method_name(compensation)}"
    if not isinstance(patch, Patch):
        raise SvlError(f"{who} gives {type(patch).__name__}, but must give a Patch")
    with explained(f"{who} gives a patch that is not as svl.core.Patch says"):
        changed = {layer for layer, _ in patch.updates} | set(patch.blends) | set(patch.joins)
        if gone := sorted(changed - set(plan.kept)):
            raise SvlError(f"{who} changes layers {gone}, which the plan does not keep")
        if lost := sorted(set(patch.updates) & set(plan.sublayers)):
            raise SvlError(f"{who} changes '{lost[0][1]}' of layer {lost[0][0]}, which the plan takes from that layer")
        for (layer, writer), update in patch.updates.items():
            if not _is_finite(update):
                raise SvlError(f"{who} gives a change of '{writer}' of layer {layer} that is not finite")
        for layer, terms in patch.blends.items():
            if not all(math.isfinite(coefficient) for coefficient in terms.values()):
                raise SvlError(f"{who} blends layer {layer} with coefficients that are not finite")
        if patch.maps and compensation.foldable:
            raise SvlError(f"{who} gives maps at cuts, so its class must say foldable = False")
        if patch.joins and not compensation.joins:
            raise SvlError(f"{who} joins layers, so its class must say joins = True")
        for start, matrix in patch.maps.items():
            if not bool(matrix.isfinite().all()):
                raise SvlError(f"{who} gives a map in place of layers from {start} on that is not finite")
    return patch


def _is_finite(update: Update) -> bool:
    parts = (update.left, update.right, update.delta, update.shift, update.weight)
    if not all(part is None or bool(part.isfinite().all()) for part in parts):
        return False
    return update.scale is None or math.isfinite(update.scale)
