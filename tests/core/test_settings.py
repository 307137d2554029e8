"""Numbers that methods are set to: what is none, or out of range, is refused when the method is made."""

from __future__ import annotations

import dataclasses
import math
import typing

import pytest
from helpers.methods import CHOICES, method

from svl.compensation.ghosted import Ghosted
from svl.compensation.refit import Refit
from svl.compensation.subspace_fit import SubspaceFit
from svl.core import SvlError, check_count, check_number
from svl.strategies.laco import Laco
from svl.strategies.lorp import Lorp
from svl.strategies.swm import Swm
from svl.visual_tokens.fastv import Fastv

CLASSES = {type(method(group, name)) for group in CHOICES for name in CHOICES[group]} | {Fastv}


def numbers(cls: type) -> list[str]:
    """Settings of a method that are one number, or None."""
    kinds = typing.get_type_hints(cls)
    return [f.name for f in dataclasses.fields(cls) if {int, float} & {kinds[f.name], *typing.get_args(kinds[f.name])}
            and typing.get_origin(kinds[f.name]) is not tuple and kinds[f.name] is not bool]  # fmt: skip


BY_NAME = sorted(CLASSES, key=lambda cls: (cls.__name__, cls.__module__))
SETTINGS = [(cls, name) for cls in BY_NAME for name in numbers(cls)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", True], ids=str)
@pytest.mark.parametrize(("cls", "name"), SETTINGS, ids=lambda x: getattr(x, "__name__", x))
def test_a_setting_is_a_finite_number(cls, name, value):
    with pytest.raises(SvlError, match=rf"(strategy|selector|compensation|visual_tokens)\.{name} is .*must be"):
        cls(**{name: value})


def test_settings_are_found():
    names = {f"{cls.__name__}.{name}" for cls, name in SETTINGS}
    assert {"Linear.ridge", "Subspace.guard", "Laco.threshold", "Sleb.samples", "Lorp.clusters"} <= names


@pytest.mark.parametrize("cls", [Ghosted, Refit, SubspaceFit])
@pytest.mark.parametrize("ridges", [(), (0.0,), (-1.0, 1.0), (1.0, math.nan), (math.nan, 1.0), ("1",)], ids=str)
def test_ridges_are_numbers_above_0(cls, ridges):
    with pytest.raises(SvlError, match=r"compensation\.ridges is .* must be numbers above 0"):
        cls(ridges=ridges)
    assert cls(ridges=(1.0, math.inf))


@pytest.mark.parametrize("cls", [Laco, Swm])
def test_a_threshold_is_a_cosine(cls):
    for threshold in (1.01, -1.01, 2):
        with pytest.raises(SvlError, match=r"strategy\.threshold is .*, but must be at least -1 and at most 1"):
            cls(threshold=threshold)
    assert [cls(threshold=threshold).threshold for threshold in (1, -1.0, None)] == [1, -1.0, None]


def test_what_is_allowed_is_said():
    with pytest.raises(SvlError, match=r"^a is nan, but must be a finite number, above 0$"):
        check_number("a", math.nan, above=0)
    with pytest.raises(SvlError, match=r"^a is inf, but must be a finite number$"):
        check_number("a", math.inf)
    with pytest.raises(SvlError, match=r"^a is 0, but must be at least 1, or null for all$"):
        check_count("a", 0, least=1, unless="all")
    with pytest.raises(SvlError, match=r"^a is 1\.5, but must be a whole number$"):
        check_count("a", 1.5)
    with pytest.raises(SvlError, match=r"^a is None, but must be a whole number$"):
        check_count("a", None)
    check_count("a", None, unless="all")
    check_number("a", 0, least=0, most=0)
    with pytest.raises(SvlError, match=r"strategy\.clusters is 0, but must be at least 1, or null for the paper's"):
        Lorp(clusters=0)
