"""Covering arrays: few combinations that hold every pair of choices."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Choice = tuple[str, int]  # an axis, and the position of one of its values


def pairwise(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Combinations of one value per axis, such that every two values of different axes meet in at least one.

    Greedy: each combination starts with a pair that is still missing, and takes of every other axis the value that
    meets most of the chosen ones for the first time. No more than the two longest axes multiplied, and a few.
    """
    choices = {axis: [(axis, i) for i in range(len(values))] for axis, values in axes.items()}
    missing = dict.fromkeys(
        pair
        for one, other in itertools.combinations(axes, 2)
        for pair in itertools.product(choices[one], choices[other])
    )

    def news(choice: Choice, chosen: Sequence[Choice]) -> int:
        return sum((other, choice) in missing or (choice, other) in missing for other in chosen)

    rows = []
    while missing:
        chosen = list(next(iter(missing)))
        for axis in axes:
            if axis not in dict(chosen):
                chosen.append(max(choices[axis], key=lambda choice: news(choice, chosen)))
        for pair in itertools.permutations(chosen, 2):
            missing.pop(pair, None)
        rows.append({axis: axes[axis][i] for axis, i in sorted(chosen, key=lambda choice: list(axes).index(choice[0]))})
    return rows
