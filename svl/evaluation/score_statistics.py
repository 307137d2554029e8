"""Standard errors and intervals of scores, and comparisons of two models question by question.

Errors are standard errors. That of the retained share is paired: it comes from the change of every single sample's
score between the dense and the pruned model, which is far less noisy than comparing two independent averages.

`samples.jsonl` has one line per question. Its `score` is right (1) or wrong (0), or a share; its `part` is what the
question adds to the main metric, whatever that is (MME's sum of categories, F1): null where that is not known, left out
where the metric is the mean of the scores (see `question_parts`). Questions of one `unit` (those on one
image, the rotations of one question of MMBench) are not independent: errors, intervals and tests count units, errors
within each `stratum`.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from svl.evaluation.reading import normalise
from svl.store.artifacts import Entry

T = TypeVar("T")
RESAMPLES = 500  # of a bootstrap
NORMAL_95 = 1.959964  # a 95 % interval of a normal distribution, in standard errors on either side


class Part(NamedTuple):
    """What a question adds to a metric, the unit that it belongs to, and the stratum of that."""

    value: float
    unit: Hashable
    stratum: Hashable = None


def standard_error(parts: Iterable[Part]) -> float | None:
    """Standard error of the sum of parts, whose sums over units are independent within each stratum.

    A mean is the sum of scores / n: then this is their standard deviation / sqrt(n). None without parts, or if a
    stratum has one unit.
    """
    sums: dict[Hashable, dict[Hashable, float]] = defaultdict(lambda: defaultdict(float))
    for part in parts:
        sums[part.stratum][part.unit] += part.value
    variance = 0.0
    for units in sums.values():
        n = len(units)
        if n < 2:
            return None
        mean = math.fsum(units.values()) / n
        variance += n / (n - 1) * math.fsum((value - mean) ** 2 for value in units.values())
    return math.sqrt(variance) if sums else None


def bootstrap_error(
    value: float, items: Sequence[T], units: Sequence[Hashable], aggregate: Callable[[list[T]], float]
) -> float | None:
    """Standard error of `value`, which `aggregate` makes of items, those of one unit always drawn together.

    From RESAMPLES draws by a fixed seed; None if one of them is undefined. (Not scipy.stats.bootstrap, which resamples
    arrays: items are dicts, the functions of tasks take lists of them, and units have several.)
    """
    groups: dict[Hashable, list[T]] = defaultdict(list)
    for item, unit in zip(items, units, strict=True):
        groups[unit].append(item)
    if len(groups) < 2 or math.isnan(value):
        return None
    chance, blocks = random.Random(0), list(groups.values())
    values = []
    for _ in range(RESAMPLES):
        drawn = chance.choices(blocks, k=len(blocks))
        values.append(aggregate([item for block in drawn for item in block]))
    return None if any(map(math.isnan, values)) else statistics.stdev(values)


def share_interval(share: float, stderr: float | None, n: float, n_units: float) -> tuple[float, float]:
    """95 % interval (Wilson, 1927) of a share of `n` answers that lie in `n_units` independent units.

    As wide as of as many independent answers as have this standard error, at most `n`; as of the units where the share
    is 0 or 1, and its standard error says nothing.
    """
    variance = share * (1 - share)
    known = variance > 0 and bool(stderr)
    n = min(n, variance / stderr**2 + 1 if known and stderr else n_units)
    if n <= 0:
        return 0.0, 1.0
    z = NORMAL_95
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    margin = z * math.sqrt(variance / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, min(share, centre - margin)), min(1.0, max(share, centre + margin))


def change_error(pruned: Entry, dense: Entry, share: float = 1.0) -> float | None:
    """Standard error of `pruned - share * dense` of the main metric; None where samples have no part in it.

    Divided by the dense value it is that of the ratio of the two (delta method), if `share` is that ratio.
    """
    ours, theirs = question_parts(pruned), question_parts(dense)
    if ours is None or theirs is None or len(ours) < 2 or not ours.keys() <= theirs.keys():
        return None
    return standard_error(part._replace(value=part.value - share * theirs[i].value) for i, part in ours.items())


def question_parts(entry: Entry) -> Mapping[int, Part] | None:
    """By `doc_id`, what questions add to the main metric; None where that is not known of all of them.

    Of a line without `part`, it is that in the mean of the scores, if the metric is this mean: scores that were stored
    before lines said `part: null` have none in other metrics, either.
    """
    metric = entry.output["metric"]
    known = (entry.output.get("metrics") or {}).get(metric)
    return _parts_of_lines(entry.path / "samples.jsonl", known is None, (known or {}).get("value"))


@lru_cache(maxsize=64)  # every method is compared with the best one of its ratio, in every column
def _parts_of_lines(path: Path, is_mean: bool, value: float | None) -> Mapping[int, Part] | None:
    rows = read_sample_lines(path)
    if not all("part" in row for row in rows.values()):
        mean = math.fsum(row["score"] for row in rows.values()) / len(rows)
        if not is_mean and (value is None or not math.isclose(value, mean, rel_tol=1e-9, abs_tol=1e-9)):
            return None
    parts = {i: row.get("part", row["score"] / len(rows)) for i, row in rows.items()}
    if None in parts.values():
        return None
    return {i: Part(parts[i], row.get("unit", i), row.get("stratum")) for i, row in rows.items()}


def scored_samples(entry: Entry) -> dict[int, dict[str, Any]]:
    """By `doc_id`, the samples that the main metric is about (MME perception: not those on cognition)."""
    return read_sample_lines(entry.path / "samples.jsonl")


@lru_cache(maxsize=16)  # one dense model is compared with many
def read_sample_lines(path: Path) -> dict[int, dict[str, Any]]:
    with path.open(encoding="utf-8") as file:  # str.splitlines would also split at U+2028, which answers may have
        return {row["doc_id"]: row for row in map(json.loads, file) if row["score"] is not None}


Pair = tuple[dict[str, Any], dict[str, Any]]  # lines of two models' samples.jsonl on one question


def compare_answers(first: Entry, second: Entry) -> dict[str, Any] | None:
    """How the answers of two models to the same questions differ; None if questions have no score, or it is a loss.

    `agreement`: share of equal answers; `gained` and `lost`: questions that only the first, only the second answered
    right (score of at least 1/2); `units_gained` and `units_lost`: units of which the first, the second has more right;
    `p`: two-sided exact McNemar test of these, None where it is not known what questions add to the metric; `note`:
    what besides the models may have changed answers, or None.
    """
    common = answered_by_both(first, second)
    if not common or not first.output.get("higher_is_better", True):
        return None
    gained, lost = flipped(first, second)
    changes = unit_changes(common, bool(first.output.get("scored_together")))
    units_gained, units_lost = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    same = sum(_plain(a["prediction"]) == _plain(b["prediction"]) for a, b in common)
    return {
        "agreement": same / len(common),
        "gained": len(gained),
        "lost": len(lost),
        "units_gained": units_gained,
        "units_lost": units_lost,
        "p": mcnemar(units_gained, units_lost) if has_parts(common) else None,
        "note": device_note(first, second),
    }


def unit_changes(common: Sequence[Pair], scored_together: bool) -> list[float]:
    """For every unit, how much better the first model does than the second.

    In right answers; where the questions of a unit are `scored_together`, in what they add to the metric: the rotations
    of a question count once all are right.
    """
    changes: dict[Hashable, float] = defaultdict(float)
    for a, b in common:
        if scored_together and a.get("part") is not None and b.get("part") is not None:
            change = a["part"] - b["part"]
        else:
            change = float(a["score"] >= 0.5) - float(b["score"] >= 0.5)
        changes[a.get("unit", a["doc_id"])] += change
    return [0.0 if abs(change) < 1e-12 else change for change in changes.values()]


def has_parts(common: Sequence[Pair]) -> bool:
    """Whether no line says that the question's part in the main metric is not known."""
    return not any("part" in line and line["part"] is None for pair in common for line in pair)


def device_note(first: Entry, second: Entry) -> str | None:
    """That two models answered on different devices or in other batches, where rounding alone may change answers."""
    ours, theirs = first.output.get("device"), second.output.get("device")
    if ours == theirs or not ours or not theirs:
        return None
    return f"answered under different conditions: {_conditions(ours)}; {_conditions(theirs)}"


def _conditions(device: dict[str, Any]) -> str:
    return f"{device.get('type')} ({device.get('name')}), batches of {device.get('batch_size')}"


def answered_by_both(first: Entry, second: Entry) -> list[Pair]:
    """What both models answered, question by question."""
    ours, theirs = scored_samples(first), scored_samples(second)
    return [(ours[i], theirs[i]) for i in ours if i in theirs]


def flipped(first: Entry, second: Entry) -> tuple[list[Pair], list[Pair]]:
    """Questions that only the first, and that only the second model answered right, in the data's order."""
    common = answered_by_both(first, second)
    return (
        [(a, b) for a, b in common if a["score"] >= 0.5 > b["score"]],
        [(a, b) for a, b in common if b["score"] >= 0.5 > a["score"]],
    )


def flip_rows(pruned: Entry, dense: Entry) -> list[dict[str, Any]]:
    """What `flipped` finds, as rows of one table; `gained` says whether the pruned model was the one to be right."""
    gained, lost = flipped(pruned, dense)
    return [_flip_row(*pair, gained=True) for pair in gained] + [_flip_row(*pair, gained=False) for pair in lost]


def _flip_row(pruned: dict[str, Any], dense: dict[str, Any], gained: bool) -> dict[str, Any]:
    return {
        "no": pruned["doc_id"],
        "question": pruned["question"],
        "expected": str(pruned["target"]),
        "dense": str(dense["prediction"]),
        "pruned": str(pruned["prediction"]),
        "gained": gained,
    }


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value: that of `gained` among `gained + lost` throws of a fair coin."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _plain(answer: Any) -> str:
    return normalise(str(answer))
