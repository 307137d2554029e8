"""What merging layers does to their weights, as strategies try it out and compensations do it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from svl.core.errors import one_of

FORMULAS = ("paper", "released")  # of merging


def merge_coefficients(merges: Iterable[tuple[int, Sequence[int]]], formula: str) -> dict[int, dict[int, float]]:
    """What layers become when others are merged into them, step by step, as sums over the dense model's layers.

    One step merges layers l_1 .. l_m into l. `formula` paper: W_l + sum_k (W_{l_k} - W_l) (LaCo, arXiv 2402.11187,
    eq. 1); released: W_{l_m}, to which the sum of its published code telescopes.
    """
    one_of("formula of merging", formula, FORMULAS)
    now: dict[int, dict[int, float]] = {}
    for into, gone in merges:
        terms = {into: 1.0 - len(gone), **dict.fromkeys(gone, 1.0)} if formula == "paper" else {gone[-1]: 1.0}
        total: dict[int, float] = {}
        for layer, factor in terms.items():
            for source, coefficient in now.get(layer, {layer: 1.0}).items():
                total[source] = total.get(source, 0.0) + factor * coefficient
        now = {k: v for k, v in now.items() if k not in gone} | {into: {k: c for k, c in total.items() if c != 0}}
    return now
