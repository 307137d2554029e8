"""Runs of layers whose inputs and outputs are most similar: the best of all ways to split the number into runs.

Of all sets of n layers, the one of least sum of 1 - mean cos(h_a, h_b) over its runs [a, b) of consecutive layers. With
single layers only, this is ShortGPT's choice; with one run only, LLM-Streamline's. A run costs less than its layers one
by one where their updates cancel, and a layer beside a gap is not judged as if the gap were not there: h_a is what the
run really receives, h_b what it really gives. The errors of two gaps are taken to add up, as squared relative errors in
independent directions do (1 - cos is half of that for states of equal norm).

This is ours. Where runs are as good as single layers, it leaves fewer gaps to a compensation.

Cost: one calibration pass, whatever n; the search is exact (dynamic programming over a table of L^2 / 2 cosines).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from svl.core import Plan, Stats, Strategy


@dataclass(frozen=True)
class Runs(Strategy):
    """Layers in runs of least total 1 - cosine."""

    needs: ClassVar[frozenset[str]] = frozenset({"windows"})

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Remove the best set of runs; importance is 1 - cosine across each single layer."""
        allowed = set(stats.candidates(n_remove))
        distance = (1 - stats.windows()).tolist()
        # best[end][m]: cost and layers of the best choice of m layers below `end`, of which layer end - 1 stays; there
        # is one more kept "layer" at the end.
        nothing: tuple[float, tuple[int, ...]] = (0.0, ())
        best = [[nothing] + [(math.inf, ())] * n_remove]
        for end in range(1, stats.n_layers + 2):
            row = list(best[-1])
            for start in range(end - 2, -1, -1):  # the run [start, end - 1)
                if start not in allowed:
                    break
                length = end - 1 - start
                for m in range(length, n_remove + 1):
                    cost, layers = best[start][m - length]
                    if cost + distance[start][end - 1] < row[m][0]:
                        row[m] = cost + distance[start][end - 1], (*layers, *range(start, end - 1))
            best.append(row)
        return Plan(stats.n_layers, best[-1][n_remove][1], tuple(distance[i][i + 1] for i in range(stats.n_layers)))
