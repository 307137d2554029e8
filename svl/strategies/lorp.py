"""Locality-aware redundancy pruning (LoRP, arXiv 2605.27786): layers by clusters of similar states.

S_ij is the mean cosine of h_i and h_j over the selected tokens, for layers i, j = 0..L-1 (eqs. 3 and 4). The
representation locality score RLS = -log2(mean of S_ij, i < j) (eqs. 5 and 6) sets the number of clusters: 2 from 1.0
on, 3 from 0.7 on, else 4. Layers are clustered by spectral clustering of the affinity (S + 1) / 2 (eq. 7), clusters
being numbered by depth. The redundancy of a layer is its mean S with the other members of its cluster (eq. 8); the
first and the last layer stay. First, each cluster loses its most redundant layer, as far as the number allows; then,
as long as more are to go, the cluster whose remaining members have the largest mean S of pairs (eq. 10) loses the next.

As released, S averages the means of samples: `mean` samples. Where no cluster with a layer to lose has two
members left, the first one in depth loses it.

Cost: one calibration pass, whatever n.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from svl.core import Plan, Stats, Strategy, SvlError, check_count, one_of
from svl.core.errors import explained

Similarity = list[list[float]]  # S, [L][L]


@dataclass(frozen=True)
class Lorp(Strategy):
    """Spectral clustering of pairwise cosines.

    Attributes:
        clusters: their number; None: as the locality score says.
        protected: layers never removed; negative numbers count from the end, -1 being the last.
        seed: of the k-means of spectral clustering.
        mean: tokens (of all samples, pooled) | samples (mean of the samples' means, as released).
    """

    clusters: int | None = None
    protected: tuple[int, ...] = (0, -1)
    seed: int = 0
    mean: str = "tokens"
    needs: ClassVar[frozenset[str]] = frozenset({"windows"})

    def __post_init__(self) -> None:
        check_count("strategy.clusters", self.clusters, least=1, unless="the paper's")
        check_count("strategy.seed", self.seed)
        one_of("strategy.mean", self.mean, ("tokens", "samples"))

    def check(self, stats: Stats, n_remove: int) -> None:
        """Raise SvlError if layers that do not exist are protected, too few are left, or clusters outnumber layers."""
        stats.without(self.protected).candidates(n_remove)
        if self.clusters is not None and self.clusters > stats.n_layers:
            raise SvlError(f"strategy.clusters is {self.clusters}, but the model has only {stats.n_layers} layers")

    def plan(self, stats: Stats, n_remove: int) -> Plan:
        """Importance: 1 - redundancy; 2, the most that a cosine allows, for the only layer of a cluster.

        Raises:
            SvlError: if fewer layers may be removed, or there are fewer layers than clusters.
        """
        self.check(stats, n_remove)
        stats = stats.without(self.protected)
        allowed, n_layers = stats.candidates(n_remove), stats.n_layers
        if n_remove == 0:
            return Plan(n_layers, ())
        similarity = pairwise_similarity(stats, self.mean)
        locality = locality_score(similarity)
        clusters = self._cluster(similarity, self.clusters or min(clusters_of(locality), n_layers - 1))
        redundancy = [-1.0] * n_layers
        for members in clusters:
            for i in members:
                others = [similarity[i][m] for m in members if m != i]
                if others:
                    redundancy[i] = sum(others) / len(others)
        removed = allocate(clusters, similarity, redundancy, allowed, n_remove)
        importance = tuple(1 - r for r in redundancy)
        return Plan(n_layers, removed, importance, provenance={"locality": locality, "clusters": clusters})

    def _cluster(self, similarity: Similarity, n: int) -> list[list[int]]:
        """The members of each cluster, ascending; clusters by the depth of their first member."""
        import numpy as np  # scikit-learn takes seconds to import
        from sklearn.cluster import SpectralClustering

        affinity = (np.array(similarity) + 1) / 2
        method = SpectralClustering(n, affinity="precomputed", assign_labels="kmeans", random_state=self.seed)
        with explained("layers cannot be clustered"):
            labels = method.fit_predict(affinity).tolist()
        return [[i for i, other in enumerate(labels) if other == label] for label in dict.fromkeys(labels)]


def pairwise_similarity(stats: Stats, over: str = "tokens") -> Similarity:
    """S: mean cos(h_i, h_j), over tokens or samples, of the states that enter layers i and j; 1 on the diagonal."""
    upper = stats.windows(over=over).tolist()
    n = stats.n_layers
    return [[1.0 if i == j else upper[min(i, j)][max(i, j)] for j in range(n)] for i in range(n)]


def locality_score(similarity: Similarity) -> float:
    """RLS: the higher, the faster similarity falls with distance in depth; infinite for a mean cosine of 0 or less."""
    pairs = [similarity[i][j] for i, j in itertools.combinations(range(len(similarity)), 2)]
    mean = sum(pairs) / len(pairs)
    return -math.log2(mean) if mean > 0 else math.inf


def clusters_of(locality: float) -> int:
    """The paper's number of clusters for a locality score."""
    if locality >= 1.0:
        return 2
    return 3 if locality >= 0.7 else 4


def allocate(
    clusters: Sequence[Sequence[int]],
    similarity: Similarity,
    redundancy: Sequence[float],
    allowed: Sequence[int],
    n_remove: int,
) -> tuple[int, ...]:
    """The paper's two stages: `n_remove` of the `allowed` layers, in the order in which they go."""
    waiting = [sorted(set(members) & set(allowed), key=lambda i: (-redundancy[i], i)) for members in clusters]
    removed: list[int] = []
    for queue in waiting:
        if queue and len(removed) < n_remove:
            removed.append(queue.pop(0))

    def remaining_similarity(cluster: int) -> float:
        members = [i for i in clusters[cluster] if i not in removed]
        pairs = [similarity[i][j] for i, j in itertools.combinations(members, 2)]
        return sum(pairs) / len(pairs) if pairs else -math.inf

    while len(removed) < n_remove:
        open_clusters = [cluster for cluster, queue in enumerate(waiting) if queue]
        removed.append(waiting[max(open_clusters, key=remaining_similarity)].pop(0))
    return tuple(removed)
