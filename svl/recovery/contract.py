"""What methods of recovery must answer, checked where they are asked: a plug-in's mistake is one line that names it."""

from __future__ import annotations

from torch import nn

from svl.core import Plan, SvlError, did_you_mean
from svl.core.contract import answering, method_name
from svl.models.lvlm import Lvlm
from svl.recovery.base import Adapter, Losses, Parts, Recovery


def checked_parts(recovery: Recovery, pruned: Lvlm, plan: Plan) -> Parts:
    """`recovery.parts(pruned, plan)`; what it says of losses and adapters is checked, too.

    Args:
        recovery: the method.
        pruned: the model that is left after `plan`; its weights need not be there.
        plan: which layers are gone.

    Raises:
        SvlError: if that is nothing, or no part of this model, or can be trained in no way.
    """
    with answering(recovery):
        parts, losses, adapter = recovery.parts(pruned, plan), recovery.losses, recovery.adapter
    who = f"recovery {method_name(recovery)}"
    for given, kind, what in ((parts, Parts, "parts"), (losses, Losses, "losses"), (adapter, Adapter, "adapter")):
        if not isinstance(given, kind):
            raise SvlError(f"{who} gives {type(given).__name__} as {what}, but must give {kind.__name__}")
    for what in ("tensors", "adapted"):
        names = getattr(parts, what)
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise SvlError(f"{who} gives {names!r:.60} as Parts.{what}, but must give a tuple of names")
    _check_tensors(who, parts, pruned)
    _check_adapted(who, parts, pruned)
    if not parts.tensors and not parts.adapted:
        raise SvlError(f"{who} has nothing to train in '{pruned.name}'")
    return parts


def _check_tensors(who: str, parts: Parts, pruned: Lvlm) -> None:
    """Raise SvlError unless all tensors are parameters of the pruned model, each named once."""
    every, seen = dict(pruned.model.named_parameters(remove_duplicate=False)), dict[int, str]()
    for name in parts.tensors:
        if name not in every:
            raise SvlError(f"{who} trains '{name}', but {_has_no(pruned)} such parameter{did_you_mean(name, every)}")
        if (other := seen.setdefault(id(every[name]), name)) != name or parts.tensors.count(name) > 1:
            raise SvlError(f"{who} trains '{other}' and '{name}', which are one parameter: name it once")


def _check_adapted(who: str, parts: Parts, pruned: Lvlm) -> None:
    """Raise SvlError unless what is to be adapted are linear modules of the pruned model, not trained as a whole."""
    every = dict(pruned.model.named_modules())
    for path in parts.adapted:
        if path not in every:
            raise SvlError(f"{who} adapts '{path}', but {_has_no(pruned)} such module{did_you_mean(path, every)}")
        if type(every[path]).forward is not nn.Linear.forward:
            kind = type(every[path]).__name__
            raise SvlError(f"{who} adapts '{path}', which is {kind}: only linear modules can be adapted")
        if f"{path}.weight" in parts.tensors:
            raise SvlError(f"{who} adapts '{path}', and trains its weight as a whole: choose one of the two")
        if parts.adapted.count(path) > 1:
            raise SvlError(f"{who} adapts '{path}' twice")


def _has_no(pruned: Lvlm) -> str:
    n = pruned.anatomy.n_layers
    return f"what is left of '{pruned.name}' (layers 0..{n - 1} of '{pruned.anatomy.layers}') has no"
