"""What the tests themselves rest on."""

from __future__ import annotations

import itertools

import pytest
from helpers.pairwise import pairwise
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.integers(1, 7), min_size=2, max_size=5))
def test_every_pair_is_covered(lengths):
    axes = {f"axis {i}": [f"{i}.{k}" for k in range(n)] for i, n in enumerate(lengths)}
    rows = pairwise(axes)
    assert all(list(row) == list(axes) for row in rows)
    for one, other in itertools.combinations(axes, 2):
        assert {(row[one], row[other]) for row in rows} == set(itertools.product(axes[one], axes[other]))


@pytest.mark.parametrize(("lengths", "most"), [((23, 11, 6, 5), 260), ((3, 3, 3, 3), 12), ((5, 4), 20)])
def test_few_combinations_cover_them(lengths, most):
    """At least the two longest axes multiplied: 253, 9 and 20."""
    assert len(pairwise({str(i): range(n) for i, n in enumerate(lengths)})) <= most
