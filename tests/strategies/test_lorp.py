"""LoRP against its rules written out, its published scores, and an example by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from svl.core import Plan, Stats, SvlError, TokenTrace
from svl.selectors.all_tokens import All
from svl.strategies.lorp import Lorp


def measured(similarity: list[list[float]]) -> Stats:
    """Statistics of one token with these cosines between the states that enter layers, and 0 with the last state."""
    n = len(similarity)
    table = torch.zeros(n + 1, n + 1)
    table[:n, :n] = torch.tensor(similarity)
    i, j = torch.triu_indices(n + 1, n + 1, 1)
    trace = TokenTrace(0, torch.zeros(1, dtype=torch.bool), windows=table[i, j][:, None])
    return Stats(n, tuple(range(n)), (trace,), All())


def blocks(sizes: list[int], within: list[float], between: float) -> list[list[float]]:
    """Clusters of `sizes` layers in a row, with one cosine inside each and one between them."""
    cluster = [c for c, size in enumerate(sizes) for _ in range(size)]
    n = len(cluster)
    return [
        [1.0 if i == j else within[cluster[i]] if cluster[i] == cluster[j] else between for j in range(n)]
        for i in range(n)
    ]


# Locality scores that the authors publish, and the numbers of clusters that they say for them.
PUBLISHED = {
    "Llama-3.1-8B": (1.149, 2),
    "OLMo-3-7B": (0.941, 3),
    "Mistral-Nemo-12B": (0.926, 3),
    "Qwen3-8B": (0.685, 4),
    "Qwen3-14B": (0.644, 4),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_scores_have_their_numbers_of_clusters(model):
    score, clusters = PUBLISHED[model]
    flat = 2**-score
    chance = random.Random(model)
    similarity = blocks([16], [0.0], 0.0)
    for i in range(16):
        for j in range(i):
            similarity[i][j] = similarity[j][i] = flat + chance.choice([-0.05, 0.05])
    mean = sum(similarity[i][j] for i in range(16) for j in range(i)) / 120
    for i in range(16):
        for j in range(i):
            similarity[i][j] += flat - mean
            similarity[j][i] = similarity[i][j]
    made = Lorp().plan(measured(similarity), 3).provenance
    assert made["locality"] == pytest.approx(score, abs=1e-5)
    assert len(made["clusters"]) == clusters


def test_states_that_point_apart_are_as_local_as_can_be():
    made = Lorp().plan(measured(blocks([3, 3], [0.4, 0.4], -0.9)), 2).provenance
    assert (made["locality"], made["clusters"]) == (math.inf, [[0, 1, 2], [3, 4, 5]])


def test_an_example_by_hand():
    """Clusters {0..3}, {4..7}, {8..11} with cosines .90, .70, .80; the middle of each is a little more redundant.

    Stage 1 takes 2, 5 and 9. Then the first cluster goes on, its rest 0, 1, 3 being the most similar: 1, then 3 (0 is
    protected); the third follows, 10 and 8 (11 is protected), and the second, 4 before 6 and 7, which are alike.
    """
    similarity = blocks([4, 4, 4], [0.90, 0.70, 0.80], 0.30)
    for layer, more in ((2, 0.02), (1, 0.01), (5, 0.02), (9, 0.02), (10, 0.01)):
        for other in range(layer // 4 * 4, layer // 4 * 4 + 4):
            if other != layer:
                similarity[layer][other] += more
                similarity[other][layer] += more
    order = [2, 5, 9, 1, 3, 10, 8, 4, 6, 7]
    for n in range(len(order) + 1):
        assert Lorp(clusters=3).plan(measured(similarity), n).removed == tuple(sorted(order[:n]))
    with pytest.raises(SvlError, match="at most 10 may go"):
        Lorp(clusters=3).plan(measured(similarity), 11)
    plan = Lorp(clusters=3).plan(measured(similarity), 3)
    assert plan.provenance["clusters"] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert plan.importance[2] == pytest.approx(1 - (0.92 + 0.93 + 0.92) / 3, abs=1e-6)
    assert plan.importance[11] == pytest.approx(1 - (0.80 + 0.82 + 0.81) / 3, abs=1e-6)
    kept = Lorp(clusters=3, protected=(2, 9)).plan(measured(similarity), 3)
    assert kept.removed == (1, 5, 10)


def test_a_cluster_of_one_layer_loses_it_when_its_turn_comes():
    similarity = blocks([3, 1, 4], [0.9, 0.0, 0.8], 0.1)
    plan = Lorp(clusters=3).plan(measured(similarity), 2)
    assert plan.removed == (1, 3)
    assert plan.importance[3] == 2.0
    # with 3 and the free layers of the other two gone, nothing is left but what is protected
    assert Lorp(clusters=3).plan(measured(similarity), 6).removed == (1, 2, 3, 4, 5, 6)


def two_stages(similarity, clusters, n_remove) -> list[int]:
    """The allocation of section 5 written out with numbers of its own: no queues, every choice looked for anew."""
    last = len(similarity) - 1
    gone: list[int] = []

    def redundancy(i, members):
        return sum(similarity[i][m] for m in members) / (len(members) - 1) - similarity[i][i] / (len(members) - 1)

    def next_of(members):
        free = [i for i in members if i not in gone and i not in (0, last)]
        return max(free, key=lambda i: redundancy(i, members)) if free else None

    for members in clusters:
        if len(gone) < n_remove and (layer := next_of(members)) is not None:
            gone.append(layer)
    while len(gone) < n_remove:
        best, best_mean = None, -2.0
        for members in clusters:
            left = [i for i in members if i not in gone]
            pairs = [(i, j) for i in left for j in left if i < j]
            if next_of(members) is not None and pairs:
                mean = sum(similarity[i][j] for i, j in pairs) / len(pairs)
                if mean > best_mean:
                    best, best_mean = members, mean
        if best is None:
            best = next(members for members in clusters if next_of(members) is not None)
        gone.append(next_of(best))
    return gone


@pytest.mark.parametrize("seed", range(12))
def test_allocation_by_the_rules_written_out(seed):
    chance = random.Random(seed)
    sizes = [chance.randint(2, 6) for _ in range(chance.randint(2, 4))]
    similarity = blocks(sizes, [chance.uniform(0.6, 0.95) for _ in sizes], 0.2)
    n = len(similarity)
    for i in range(n):
        for j in range(i):
            similarity[i][j] = similarity[j][i] = similarity[i][j] + chance.uniform(-0.04, 0.04)
    for n_remove in range(1, n - 2):
        plan = Lorp(clusters=len(sizes)).plan(measured(similarity), n_remove)
        starts = [sum(sizes[:c]) for c in range(len(sizes))]
        clusters = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
        assert plan.provenance["clusters"] == clusters
        assert plan.removed == tuple(sorted(two_stages(similarity, clusters, n_remove)))


def test_models_of_few_layers_have_fewer_clusters():
    for n in range(3, 7):
        similarity = [[0.95 ** abs(i - j) for j in range(n)] for i in range(n)]
        plan = Lorp().plan(measured(similarity), 1)
        assert len(plan.provenance["clusters"]) == min(4, n - 1)
    assert Lorp().plan(measured([[1.0]]), 0) == Plan(1, ())


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(SvlError, match=r"strategy\.clusters is 0, but must be at least 1"):
        Lorp(clusters=0)
    with pytest.raises(SvlError, match=r"strategy\.clusters is 7, but the model has only 6 layers"):
        Lorp(clusters=7).plan(measured(blocks([3, 3], [0.9, 0.9], 0.1)), 1)
