"""Which decoder layers go: plain data that a strategy writes and the surgeon executes."""

from __future__ import annotations

import json
import math
import operator
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from svl.core.errors import SvlError

ROLES = ("attn", "mlp")  # what a layer writes into the stream with, in the order in which it does
MOST_LAYERS = 100_000  # far more than any model has, far fewer than fill memory


def layers_to_remove(ratio: float, n_layers: int) -> int:
    """floor(ratio * n_layers + 0.5): the one rounding rule (10 / 20 / 30 % of 32 layers are 3 / 6 / 10).

    Raises:
        SvlError: if `ratio` lies outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise SvlError(f"ratio is {ratio:g}, but must lie in [0, 1): it is the fraction of decoder layers removed")
    return math.floor(ratio * n_layers + 0.5)


def whole_number(name: str, value: object) -> int:
    """`value` as an int, numpy's integers included.

    Raises:
        SvlError: if it is anything else: a fraction, text, True.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise SvlError(f"{name} is {reprlib.repr(value)}, but must be a whole number") from error


def finite_number(name: str, value: Any) -> float:
    """`value` as a float, numpy's and torch's scalars included.

    Raises:
        SvlError: if it is anything else: text, True, NaN, infinite.
    """
    try:
        if isinstance(value, bool | str | bytes) or not math.isfinite(number := float(value)):
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise SvlError(f"{name} is {reprlib.repr(value)}, but must be a finite number") from error
    return number


@dataclass(frozen=True)
class Plan:
    """Which decoder layers go. Plain data: about 1 KB of JSON, valid for any checkpoint of that model.

    Attributes:
        n_layers: decoder layers of the dense model.
        removed: 0-based indices of the layers to remove, ascending.
        importance: one number per original layer, higher = keep (cosine scores: 1 - mean cosine); empty if the
            strategy has none.
        merges: steps (kept layer, the layers merged into it), in order, where the strategy decided on merging; what
            merging does to weights is up to the compensation.
        provenance: how the plan was made (`strategy`, `selector`, `model`, `ratio`, ...); not part of its identity, and
            nothing depends on it but what a recovery reads of it by name (`Recovery.reads_of_plan`).
        order: the removed layers in the order in which they went, where each was chosen on what the earlier ones left;
            compensations that follow such steps measure in this order.
        removed_attn: layers that stay, but without their attention.
        removed_mlp: layers that stay, but without their MLP. One that would lose both is a removed layer.
    """

    n_layers: int
    removed: tuple[int, ...]
    importance: tuple[float, ...] = ()
    merges: tuple[tuple[int, tuple[int, ...]], ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)
    order: tuple[int, ...] = ()
    removed_attn: tuple[int, ...] = ()
    removed_mlp: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        n_layers = whole_number("n_layers of a plan", self.n_layers)
        removed = sorted(whole_number("a removed layer", i) for i in self.removed)
        removed, lost = _sorted_out(n_layers, removed, {role: getattr(self, f"removed_{role}") for role in ROLES})
        for role, layers in lost.items():
            object.__setattr__(self, f"removed_{role}", layers)
        object.__setattr__(self, "n_layers", n_layers)
        object.__setattr__(self, "removed", tuple(removed))
        if n_layers > MOST_LAYERS:
            raise SvlError(f"plan is for {n_layers} decoder layers, but no model has more than {MOST_LAYERS}")
        wrong = [i for i in self.removed if not 0 <= i < self.n_layers]
        if wrong or len(set(self.removed)) != len(self.removed):
            listing = reprlib.repr(removed) if len(removed) > self.n_layers else removed
            raise SvlError(f"plan removes layers {listing}, but the model has layers 0..{self.n_layers - 1}")
        if len(self.removed) >= self.n_layers:
            raise SvlError(f"plan removes all {self.n_layers} decoder layers; at least one must stay")
        importance = tuple(finite_number("the importance of a layer", x) for x in self.importance)
        object.__setattr__(self, "importance", importance)
        if importance and len(importance) != self.n_layers:
            raise SvlError(f"plan has {len(importance)} importances for {self.n_layers} layers")
        name = "a merged layer"
        merges = [(whole_number(name, i), tuple(whole_number(name, k) for k in gone)) for i, gone in self.merges]
        object.__setattr__(self, "merges", tuple(merges))
        if itself := [i for i, gone in merges if i in gone]:
            raise SvlError(f"plan merges layer {itself[0]} into itself")
        merged = [k for _, gone in merges for k in gone]
        if merges and (sorted(merged) != removed or not all(0 <= i < self.n_layers for i, _ in merges)):
            raise SvlError(f"plan merges layers {sorted(merged)} away, but removes {removed}")
        object.__setattr__(self, "order", tuple(whole_number("a layer in the order of removal", i) for i in self.order))
        if self.order and sorted(self.order) != removed:
            raise SvlError(f"plan removes layers in the order {list(self.order)}, but removes {removed}")

    @property
    def sublayers(self) -> tuple[tuple[int, str], ...]:
        """What kept layers lose, as (layer, "attn" or "mlp"), ascending."""
        return tuple(sorted([(i, "attn") for i in self.removed_attn] + [(i, "mlp") for i in self.removed_mlp]))

    @property
    def removal_names(self) -> tuple[str, ...]:
        """What goes, by layer: "6" for a whole layer, "9.attn" or "9.mlp" for a part of one that stays."""
        gone = [(i, "") for i in self.removed] + [(i, f".{role}") for i, role in self.sublayers]
        return tuple(f"{i}{part}" for i, part in sorted(gone))

    @property
    def is_empty(self) -> bool:
        """Whether nothing is removed."""
        return not (self.removed or self.sublayers)

    @property
    def kept(self) -> tuple[int, ...]:
        """0-based indices of the layers that stay, ascending."""
        return tuple(i for i in range(self.n_layers) if i not in set(self.removed))

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Contiguous removed runs as half-open pairs: {3, 4, 7} -> ((3, 5), (7, 8))."""
        runs: list[tuple[int, int]] = []
        for i in self.removed:
            if runs and runs[-1][1] == i:
                runs[-1] = (runs[-1][0], i + 1)
            else:
                runs.append((i, i + 1))
        return tuple(runs)

    @property
    def runs_with_layer_before(self) -> tuple[tuple[int, int], ...]:
        """The removed runs that a kept layer stands before: all but one from layer 0 on."""
        return tuple((start, stop) for start, stop in self.runs if start > 0)

    def with_layers(self, removed: Iterable[int], order: Iterable[int] = ()) -> Plan:
        """A plan that takes these whole layers, and what this one takes of layers that stay.

        Without any layer, it is what the gaps of this plan are measured on: the model that lacks its sub-layers only.
        """
        attn, mlp = self.removed_attn, self.removed_mlp
        return Plan(self.n_layers, tuple(removed), order=tuple(order), removed_attn=attn, removed_mlp=mlp)

    def to_json(self) -> str:
        """The plan as JSON text, readable by `from_json`."""
        body: dict[str, Any] = {"n_layers": self.n_layers, "removed": self.removed, "kept": self.kept}
        steps: dict[str, Any] = {"merges": self.merges, "order": self.order}
        steps |= {"removed_attn": self.removed_attn, "removed_mlp": self.removed_mlp}
        given = {name: value for name, value in steps.items() if value}
        return json.dumps({**body, "importance": self.importance, **given, **self.provenance}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan; a hand-written one needs `n_layers` and `removed` only.

        Raises:
            SvlError: if the text is not JSON, lacks those keys, or names impossible layers.
        """
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SvlError(f"not a plan: {error}") from error
        if not isinstance(body, dict):
            raise SvlError("not a plan: it is no JSON object")
        for key in ("n_layers", "removed"):
            if key not in body:
                raise SvlError(f"not a plan: key '{key}' is missing (n_layers and removed are needed)")
        n_layers, removed = body.pop("n_layers"), body.pop("removed")
        importance, merges = body.pop("importance", None) or [], body.pop("merges", None) or []
        others = [body.pop(name, None) or [] for name in ("order", "removed_attn", "removed_mlp")]
        if not all(isinstance(x, list) for x in (removed, importance, merges, *others)):
            raise SvlError("not a plan: removed, importance, merges, order, removed_attn, removed_mlp must be lists")
        if not all(isinstance(step, list) and len(step) == 2 and isinstance(step[1], list) for step in merges):
            raise SvlError("not a plan: merges must be pairs of a layer and a list of layers")
        kept = body.pop("kept", None)
        try:
            plan = cls(n_layers, tuple(removed), tuple(importance), tuple(merges), body, *map(tuple, others))
            if kept and kept != list(plan.kept):
                raise SvlError("kept and removed contradict each other (kept can be left out)")
            return plan
        except SvlError as error:
            raise SvlError(f"not a plan: {error}") from error


def _sorted_out(
    n_layers: int, removed: list[int], lost: dict[str, Iterable[int]]
) -> tuple[list[int], dict[str, tuple[int, ...]]]:
    """The layers to remove, with those that lose all their sub-layers, and of others what they lose, by role.

    Raises:
        SvlError: if sub-layers are not different ones of layers that stay.
    """
    parts = {}
    for role, given in lost.items():
        name = f"removed_{role}"
        layers = sorted(whole_number(f"a layer of {name}", i) for i in given)
        if len(set(layers)) != len(layers) or not all(0 <= i < n_layers for i in layers):
            raise SvlError(f"{name} of a plan is {reprlib.repr(layers)}, but must be different ones of its layers")
        if gone := sorted(set(layers) & set(removed)):
            raise SvlError(f"{name} of a plan has layers {gone}, which are removed as a whole")
        parts[role] = set(layers)
    whole = set.intersection(*parts.values())
    return sorted([*removed, *whole]), {role: tuple(sorted(layers - whole)) for role, layers in parts.items()}
