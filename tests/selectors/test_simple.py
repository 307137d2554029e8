"""Selectors that need no measurement."""

from __future__ import annotations

import torch

from svl.core import TokenTrace
from svl.selectors.random import Random


def test_random_selects_a_fraction_by_seed_and_sample():
    tokens = [TokenTrace(i, torch.zeros(25, dtype=torch.bool)) for i in range(3)]
    assert [int(Random(p=p).weights(tokens[0]).sum()) for p in (0.28, 0.5, 0.01, 1.0)] == [7, 13, 1, 25]
    marks = [Random(seed=s).weights(t) for s in (0, 1) for t in tokens]
    assert len({tuple(m.tolist()) for m in marks}) == 6
