"""Strategies that measure nothing."""

from __future__ import annotations

from svl.core import Stats
from svl.strategies.identity import Identity
from svl.strategies.manual import Manual
from svl.strategies.random import Random as RandomLayers
from svl.strategies.tail import Tail


def test_baselines():
    stats = Stats(6, tuple(range(6)))
    assert Identity().plan(stats, 3).removed == ()
    assert Manual((4, 1)).plan(stats, 5).removed == (1, 4)
    assert Tail().plan(stats, 2).removed == (3, 4)  # the last stays ..
    assert Tail().plan(stats, 5).removed == (0, 1, 2, 3, 4)  # .. always
    plans = [RandomLayers(seed).plan(stats, n) for seed in range(9) for n in (2, 3)]
    assert plans[::2] == [RandomLayers(seed).plan(stats, 2) for seed in range(9)]  # by seed ..
    assert len({p.removed for p in plans[::2]}) > 3
    assert all(
        set(few.removed) < set(more.removed) for few, more in zip(plans[::2], plans[1::2], strict=True)
    )  # nested
