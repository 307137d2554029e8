"""Layers tried out on small random states: whether what is folded into their weights does what it is meant to do.

Names of modules tell little: a norm behind a projection may have any name, or be switched on by a setting, and a third
block may write into the residual stream. So one layer of every kind is run as it would be changed, within a forward
pass of the model, which gives it its other arguments. States are small, so that rounding hides nothing of what the
layer adds to them; five or so runs of a layer cost next to nothing beside a calibration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svl.core.errors import SvlError, explained
from svl.core.patch import JoinedPart, Update
from svl.core.plan import ROLES
from svl.models.anatomy import Anatomy
from svl.models.devices import fp64_device
from svl.models.layer_calls import first_argument, first_output, hooked, other_arguments
from svl.models.lvlm import Lvlm, no_progress
from svl.models.placement import changed_tensors, stored_tensor
from svl.pruning import folding
from svl.pruning.joining import join_rules, join_tensors
from svl.pruning.selfcheck import example_inputs

SMALL = 2.0**-5  # size of the states: updates of a layer that normalises its input are larger by far
Inputs = dict[str, Tensor]


class _EndedError(Exception):
    """Raised in a forward pass when every kind of layer has been tried."""


class _Direct(nn.Module):
    """A layer without its hooks, which would take a trial for a part of the pass."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.forward(*args, **kwargs)


@dataclass(frozen=True)
class LayerTrial:
    """A layer within a pass, ready to run on a state of its own."""

    number: int
    layer: nn.Module
    state: Tensor  # [B, T, d]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, changed: dict[str, Tensor] | None = None) -> Tensor:
        """What the layer, with other parameters `changed`, makes of the state: fp32 [B, T, d]."""
        with changed_tensors(self.layer, changed or {}) as in_memory:
            named = {f"layer.{name}": tensor for name, tensor in in_memory.items()}
            output = torch.func.functional_call(_Direct(self.layer), named, (self.state, *self.args), self.kwargs)
        return first_output(output).float()

    def scaled(self, anatomy: Anatomy, scales: dict[str, float]) -> Tensor:
        """What it makes of the state if its writers' weights are `scales` times what they are, by role."""
        changed = {}
        for role, scale in scales.items():
            update = Update(scale=scale)
            for name, flipped in folding.tensors_of_update(anatomy, self.number, role, update).items():
                if scale != 1:
                    changed[name] = folding.fold_update(stored_tensor(self.layer, name), update, flipped)
        return self.run(changed)

    def given_and_added(self, anatomy: Anatomy, role: str) -> tuple[Tensor, Tensor, float]:
        """What the writer `role` gives, and what the layer adds to the stream for it alone: fp32 [B T, d].

        Also how large the error of the second may be, as a norm.
        """
        nothing = dict.fromkeys(anatomy.writers, 0.0)
        without, given = self.scaled(anatomy, nothing), []
        module = self.layer.get_submodule(anatomy.writers[role][self.number].module)
        with hooked([module.register_forward_hook(lambda _, args, output: given.append(first_output(output)))]):
            whole = self.scaled(anatomy, {**nothing, role: 1.0})
        rounding = 4 * self.eps * float(without.norm() + whole.norm())
        width = anatomy.hidden_size
        return given[0].to(whole).reshape(-1, width), (whole - without).reshape(-1, width), rounding

    @property
    def eps(self) -> float:
        """The relative distance of neighbouring numbers of the state's dtype."""
        return torch.finfo(self.state.dtype).eps


def check_folding(lvlm: Lvlm, inputs: Inputs | None = None, only_scales: bool = False) -> None:
    """Check that scaling what its writers write scales all that a layer adds to the residual stream.

    Args:
        lvlm: with weights, in memory or not.
        inputs: of the pass in which layers are tried; by default a short prompt, with a picture if there can be one.
        only_scales: whether nothing else than scaling is meant to be folded in; what does more needs layers that add
            what writers give times one number, for all channels.

    Raises:
        SvlError: if a norm, or anything else that is not linear, stands between a writer and the stream, or a layer
            passes on more than its input and what the writers write.
    """
    folding.check_foldable(lvlm)

    def check(trial: LayerTrial) -> None:
        anatomy, what = lvlm.anatomy, f"layer {trial.number} of '{lvlm.name}'"
        roles = tuple(anatomy.writers)
        nothing = dict.fromkeys(roles, 0.0)
        without = trial.scaled(anatomy, nothing)
        state = trial.state.to(without)  # which came from another device, maybe
        if len(roles) == 2 and not _is_small(without - state, 4 * trial.eps * (without.norm() + state.norm())):
            raise SvlError(
                f"{what} passes on another state than it is given when {_named(trial, anatomy)} write nothing: it "
                "normalises the residual stream itself, or writes into it elsewhere, so a compensation that is folded "
                "into these weights does not do what it is meant to do; use compensation=none"
            )
        for role in roles:  # halves: exact in every dtype, but for the last addition
            half, whole = (trial.scaled(anatomy, {**nothing, role: scale}) - without for scale in (0.5, 1.0))
            rounding = 4 * trial.eps * (2 * without.norm() + 2 * half.norm() + whole.norm())
            if not _is_small(whole - 2 * half, 0.02 * whole.norm() + rounding):
                raise SvlError(
                    f"{what} does not add what {_named(trial, anatomy, role)} writes to the residual stream as it is, "
                    "but normalises it, or the like, which undoes what a compensation folds into that weight; use "
                    "compensation=none"
                )
            given, added, rounding = trial.given_and_added(anatomy, role)
            seen = added.any(-1)
            if not only_scales and _common_factor(given[seen], added[seen], rounding) is None:
                raise SvlError(
                    f"{what} multiplies what {_named(trial, anatomy, role)} writes by other numbers in other channels "
                    "before it adds it to the residual stream, so what a compensation folds into that weight does not "
                    "reach the stream as it is meant to; use compensation=magnitude or none"
                )

    _try_layers(lvlm, inputs, check, layer_kinds(lvlm, range(len(lvlm.layers))))


def stream_factors(
    lvlm: Lvlm, layers: Collection[int], inputs: Inputs | None = None
) -> dict[tuple[int, str], float | None]:
    """How many times what a writer gives is added to the residual stream, by (layer, role) of `layers`.

    1 in most models, exactly; others multiply it by a constant (Granite) or by a gate of the layer's own (Mllama). None
    where it is not one number for all channels and tokens. Layers that do not run on these inputs are missing; `inputs`
    are as of `check_folding`.
    """
    found: dict[tuple[int, str], float | None] = {}

    def measure(trial: LayerTrial) -> None:
        for role in lvlm.anatomy.writers:
            found[trial.number, role] = _common_factor(*trial.given_and_added(lvlm.anatomy, role))

    _try_layers(lvlm, inputs, measure, sorted(layers))
    return found


def _common_factor(given: Tensor, added: Tensor, rounding: float) -> float | None:
    """The number that `given` [n, d] is multiplied by to give `added`, 1 if only rounding tells it from that; None if
    there is no such number."""
    place = fp64_device(given.device)
    given, added = given.to(place).double(), added.to(place).double()
    energy = float(given.square().sum())
    if energy == 0 or not bool(added.any()):
        return 0.0 if energy else 1.0
    factor = float((given * added).sum()) / energy
    if not _is_small(added - factor * given, 0.02 * added.norm() + rounding):
        return None
    noise = rounding / math.sqrt(energy * given.numel())  # of a mean over that many numbers
    return 1.0 if abs(factor - 1) <= 1e-3 + 8 * noise else factor


def check_joining(lvlm: Lvlm, inputs: Inputs | None = None) -> None:
    """Check that some neighbours can be joined, and that the order of channels and heads in a layer does not matter.

    A layer joined of all its own channels and heads in another order must compute what it did.

    Raises:
        SvlError: if layers have tensors of which it is not known how they are joined, no two neighbours are of one
            shape, or the order does matter.
    """

    def check(trial: LayerTrial) -> None:
        part = _own_parts(lvlm, trial.number, backwards=True)
        rules = join_rules(folding.parameter_shapes(lvlm.layers[trial.number]), (part,), lvlm.anatomy.hidden_size)
        joined = {}
        for name, rule in rules.items():
            joined[name] = join_tensors(name, {part.layer: stored_tensor(trial.layer, name)}, (part,), rule)
        before, after = trial.run(), trial.run(joined)
        if not _is_small(after - before, max(4 * trial.eps, 1e-4) * before.norm()):
            raise SvlError(
                f"layers of '{lvlm.name}' cannot be joined: layer {trial.number}, with its own channels and heads in "
                "another order, computes something else; choose another compensation"
            )

    _try_layers(lvlm, inputs, check, layer_kinds(lvlm, sorted(joinable_layers(lvlm))))


def joinable_layers(lvlm: Lvlm) -> set[int]:
    """Layers that can be joined with the one before or behind them, as far as names and shapes tell.

    Raises:
        SvlError: if there are none.
    """
    shapes = [folding.parameter_shapes(layer) for layer in lvlm.layers]
    pairs = [i for i in lvlm.anatomy.removable if i > 0 and shapes[i - 1] == shapes[i]]
    if not pairs:
        raise SvlError(f"no two neighbours of '{lvlm.name}' can be joined: their weights differ in names or shapes")
    problems = {i: _join_problem(lvlm, i) for i in pairs}
    if all(problems.values()):
        raise SvlError(f"layers of '{lvlm.name}' cannot be joined: {problems[pairs[0]]}")
    return {i for pair in pairs if not problems[pair] for i in (pair - 1, pair)}


def _join_problem(lvlm: Lvlm, i: int) -> str:
    """Why a layer cannot be joined of parts, as far as names and shapes tell; nothing if it can."""
    try:
        join_rules(folding.parameter_shapes(lvlm.layers[i]), (_own_parts(lvlm, i),), lvlm.anatomy.hidden_size)
    except SvlError as error:
        return str(error)
    return ""


def _own_parts(lvlm: Lvlm, i: int, backwards: bool = False) -> JoinedPart:
    """A layer as a part of itself, its channels and heads in their order, or `backwards`.

    Raises:
        SvlError: if several matrices, or none, write in a role.
    """
    matrices = []
    for role in ROLES:
        writer = lvlm.anatomy.writers.get(role, ())[i : i + 1]
        if not writer or not writer[0].single:
            raise SvlError(f"its '{role}' does not write through one matrix; choose another compensation")
        matrices.append(lvlm.layers[i].get_parameter(f"{writer[0].module}.weight"))
    queries, groups = lvlm.heads

    def order(n: int) -> Tensor:
        return torch.arange(n).flip(0) if backwards else torch.arange(n)

    kept = order(groups)
    of_groups = kept[:, None] * (queries // groups) + torch.arange(queries // groups)
    return JoinedPart(i, 1.0, 1.0, order(matrices[1].shape[1]), of_groups.flatten(), kept)


def _is_small(error: Tensor, allowed: Tensor | float) -> bool:
    """Whether an error is not above a bound; states that are not finite are told of where they are measured."""
    return not bool(error.norm() > allowed)


def _named(trial: LayerTrial, anatomy: Anatomy, role: str | None = None) -> str:
    """The weights of one writer, or of all, for messages."""
    roles = tuple(anatomy.writers) if role is None else (role,)
    names = [name for r in roles for name in anatomy.writers[r][trial.number].matrices]
    return " and ".join(names) if len(names) <= 2 else f"{', '.join(names[:2])}, ..."


def layer_kinds(lvlm: Lvlm, layers: Iterable[int]) -> list[int]:
    """The first of these layers of every kind: of the same modules, shapes, and switches of its own."""
    first: dict[Any, int] = {}
    for i in layers:
        layer = lvlm.layers[i]
        modules = tuple((name, type(module)) for name, module in layer.named_modules())
        shapes = tuple(folding.parameter_shapes(layer).items())
        switches = tuple((n, value) for m in layer.modules() for n, value in vars(m).items() if isinstance(value, bool))
        first.setdefault((modules, shapes, switches), i)
    return list(first.values())


def _try_layers(lvlm: Lvlm, inputs: Inputs | None, check: Callable[[LayerTrial], None], numbers: Sequence[int]) -> None:
    """Call `check` with the layers of these numbers, within a forward pass that ends behind the last of them.

    Layers that do not run on these inputs (cross-attention, without a picture) are not tried.
    """
    inputs = example_inputs(lvlm) if inputs is None else inputs

    def hook(i: int) -> Callable[..., None]:
        def attempt(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = first_argument(args, kwargs)
            noise = torch.randn(given.shape, generator=torch.Generator().manual_seed(i)) * SMALL
            check(LayerTrial(i, layer, noise.to(given), *other_arguments(args, kwargs)))
            if i == numbers[-1]:
                raise _EndedError

        return attempt

    def work(model: Lvlm, _: None) -> None:
        handles = (model.layers[i].register_forward_hook(hook(i), with_kwargs=True) for i in numbers)
        with hooked(handles), suppress(_EndedError), torch.no_grad():
            model.model(**inputs, use_cache=False)

    with explained(f"the layers of '{lvlm.name}' cannot be tried on an example"):
        for _ in lvlm.map(work, [None], no_progress):
            pass
