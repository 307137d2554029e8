"""Tests of two methods' answers to the same questions, over one or several seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from svl.evaluation.score_statistics import Part, mcnemar, question_parts
from svl.store.artifacts import Entry

DIFFERENCES = {  # of the inputs of scores that answers to one question are not compared across
    "benchmark": "the benchmark's files differ",
    "metric": "the metrics differ",
    "limit": "limits differ",
    "style": "prompt styles differ",
    "frames": "numbers of frames differ",
    "evaluator": "what answers the questions differs",
}
FLIPS, BLOCK = 4000, 200  # draws of a permutation test, and how many at a time


def paired_changes(first: Sequence[Entry], second: Sequence[Entry]) -> list[Part] | None:
    """What every question adds to `first - second` of the main metric; None where not known, or not the same questions.

    Of several models on either side (those of several seeds) their mean, which is the mean over all pairs of them.
    """
    changes: dict[int, Part] = {}
    for sign, entries in ((1.0, first), (-1.0, second)):
        for entry in entries:
            parts = question_parts(entry)
            if parts is None or unlike(first[0], entry):
                return None
            if changes and parts.keys() != changes.keys():
                return None
            for i, part in parts.items():
                before = changes[i].value if i in changes else 0.0
                changes[i] = part._replace(value=before + sign * part.value / len(entries))
    return list(changes.values()) if len(changes) > 1 else None


def unlike(first: Entry, second: Entry) -> str | None:
    """Why two scores of one task are not of the same questions, asked in the same way, or None."""
    both = (first, second)
    ours, theirs = inputs = [entry.manifest.get("inputs") or {} for entry in both]
    for name, what in DIFFERENCES.items():
        if ours.get(name) != theirs.get(name):
            return what
    # the cap that held, where a score tells it: one that is given may be the task's own
    caps = [e.output.get("max_new_tokens", given.get("max_new_tokens")) for e, given in zip(both, inputs, strict=True)]
    return "caps of an answer's length differ" if caps[0] != caps[1] else None


def paired_p(changes: Iterable[Part]) -> float:
    """Two-sided p-value of the sum of paired changes: how often random signs of the units' changes sum to as much.

    Exact where all that changes changes by the same: that is McNemar's test; else from FLIPS draws by a fixed seed.
    """
    sums: dict[Hashable, float] = defaultdict(float)
    for change in changes:
        sums[change.unit] += change.value
    moved = np.array([value for value in sums.values() if abs(value) > 1e-12])
    if not len(moved) or np.allclose(abs(moved), abs(moved[0]), rtol=1e-9, atol=0):
        return mcnemar(int((moved > 0).sum()), int((moved < 0).sum()))
    chance, least, extreme = np.random.default_rng(0), abs(moved.sum()) * (1 - 1e-9), 0
    for _ in range(FLIPS // BLOCK):
        signs = 2.0 * chance.integers(0, 2, (BLOCK, len(moved))) - 1
        extreme += int((abs(signs @ moved) >= least).sum())
    return (1 + extreme) / (1 + FLIPS)
