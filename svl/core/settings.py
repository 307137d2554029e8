"""What numbers a setting may be: checked when a method is made, so before anything is computed."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence

from svl.core.errors import SvlError, one_of
from svl.core.plan import ROLES, whole_number


def check_number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
    unless: str = "",
) -> None:
    """Raise SvlError unless `value` is a finite number: at least `least`, above `above`, below `below`, at most `most`.

    With `unless`, which says what None means, it may also be None.
    """
    if value is None and unless:
        return
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not usable or not least <= value <= most or not above < value < below:  # type: ignore[operator]
        limits = (("at least", least), ("above", above), ("below", below), ("at most", most))
        bounds = [f"{word} {bound:g}" for word, bound in limits if math.isfinite(bound)]
        wanted = " and ".join(bounds) if usable and bounds else ", ".join(["a finite number", *bounds])
        shown = f"{value:g}" if isinstance(value, float) else reprlib.repr(value)
        or_null = f", or null for {unless}" if unless else ""
        raise SvlError(f"{name} is {shown}, but must be {wanted}{or_null}")


def check_targets(name: str, targets: Sequence[str]) -> None:
    """Raise SvlError unless `targets` names attn, mlp or both."""
    for target in targets:
        one_of(name, target, ROLES)
    if not targets:
        raise SvlError(f"{name} is empty, but must name attn, mlp or both")
    if len(set(targets)) < len(targets):
        raise SvlError(f"{name} is {list(targets)}, but must name attn and mlp at most once each")


LARGEST_SEED = 2**32 - 1  # that numpy takes


def check_count(name: str, value: object, *, least: int = 0, most: int | None = None, unless: str = "") -> None:
    """Raise SvlError unless `value` is a whole number of at least `least`, and at most `most`.

    With `unless`, which says what None means, it may also be None.
    """
    if value is None and unless:
        return
    number, or_null = whole_number(name, value), f", or null for {unless}" if unless else ""
    if number < least:
        raise SvlError(f"{name} is {value}, but must be at least {least}{or_null}")
    if most is not None and number > most:
        raise SvlError(f"{name} is {value}, but must be at most {most}{or_null}")
