"""From stored scores to a run's result: dense values beside pruned ones, averages, the retained share, costs.

Errors are standard errors. That of the retained share is paired: it comes from the change of every single sample's
score between the dense and the pruned model, which is far less noisy than comparing two independent averages.

`samples.jsonl` has one line per question. Its `score` is right (1) or wrong (0), or a share; its `part` is what the
question adds to the main metric, whatever that is (MME's sum of categories, F1). Questions of one `unit` (the two on
one image of MME, the rotations of one of MMBench) are not independent: errors count units, within each `stratum`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from svl.core import Plan
from svl.store import Entry


def summarise(pruned: Mapping[str, Entry], dense: Mapping[str, Entry], scales: Mapping[str, float]) -> dict[str, Any]:
    """`scores`, `average` (mean over tasks of main metric / scale) and `retained` (average / dense average).

    The last two are None without tasks, or where a main metric is undefined for this model; a share of a loss means
    nothing, so `retained` is None for tasks whose lower values are better, too.
    """
    scores: dict[str, Any] = {}
    for task, entry in pruned.items():
        ours, theirs = entry.output["metrics"], dense[task].output["metrics"]
        metrics = {name: {**metric, "dense": theirs[name]["value"]} for name, metric in ours.items()}
        scores[task] = {"metric": entry.output["metric"], "n": entry.output["n"], "metrics": metrics}
        scores[task] |= {name: entry.output[name] for name in ("higher_is_better", "prompt") if name in entry.output}
        scores[task]["change"] = compare(entry, dense[task])
    main = {task: score["metrics"][score["metric"]] for task, score in scores.items()}
    value = _mean([m["value"] for m in main.values()], scales)
    reference = _mean([m["dense"] for m in main.values()], scales)
    if value is None or reference is None:
        return {"scores": scores, "average": None, "retained": None}
    average = {"value": value, "stderr": _error([m["stderr"] for m in main.values()], scales), "dense": reference}
    if reference == 0 or not all(score.get("higher_is_better", True) for score in scores.values()):
        return {"scores": scores, "average": average, "retained": None}
    share = value / reference
    change = _error([change_error(pruned[task], dense[task], share) for task in pruned], scales)
    retained = {"value": share, "stderr": None if change is None else change / reference}
    return {"scores": scores, "average": average, "retained": retained}


def _mean(values: list[float | None], scales: Mapping[str, float]) -> float | None:
    known = [v / s for v, s in zip(values, scales.values(), strict=True) if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _error(errors: list[float | None], scales: Mapping[str, float]) -> float | None:
    """Standard error of a mean of independent task scores."""
    known = [e / s for e, s in zip(errors, scales.values(), strict=True) if e is not None]
    return math.sqrt(sum(e * e for e in known)) / len(known) if known and len(known) == len(errors) else None


def spread(parts: Sequence[float], units: Sequence[Hashable], strata: Sequence[Hashable]) -> float | None:
    """Standard error of the sum of `parts`, whose sums over units are independent within each stratum.

    A mean is the sum of scores / n: then this is their standard deviation / sqrt(n). None if a stratum has one unit.
    """
    sums: dict[Hashable, dict[Hashable, float]] = defaultdict(lambda: defaultdict(float))
    for part, unit, stratum in zip(parts, units, strata, strict=True):
        sums[stratum][unit] += part
    variance = 0.0
    for values in map(list, (units.values() for units in sums.values())):
        if len(values) < 2:
            return None
        mean = math.fsum(values) / len(values)
        variance += len(values) / (len(values) - 1) * math.fsum((v - mean) ** 2 for v in values)
    return math.sqrt(variance) if sums else None


def change_error(pruned: Entry, dense: Entry, share: float = 1.0) -> float | None:
    """Standard error of `pruned - share * dense` of the main metric; None where samples have no part in it.

    Divided by the dense value it is that of the ratio of the two (delta method), if `share` is that ratio.
    """
    ours, theirs = _samples(pruned), _samples(dense)
    both = [(ours[i], theirs[i]) for i in ours if i in theirs]
    if len(both) < max(2, len(ours)):
        return None
    # a part in a mean is not written out
    changes = [a.get("part", a["score"] / len(ours)) - share * b.get("part", b["score"] / len(theirs)) for a, b in both]
    return spread(changes, [a.get("unit", a["doc_id"]) for a, _ in both], [a.get("stratum") for a, _ in both])


def _samples(entry: Entry) -> dict[int, dict[str, Any]]:
    """By `doc_id`, the samples that the main metric is about (MME perception: not those on cognition)."""
    return _read(entry.path / "samples.jsonl")


@lru_cache(maxsize=16)  # one dense model is compared with many
def _read(path: Path) -> dict[int, dict[str, Any]]:
    with path.open(encoding="utf-8") as file:  # str.splitlines would also split at U+2028, which answers may have
        return {row["doc_id"]: row for row in map(json.loads, file) if row["score"] is not None}


# ---------------------------------------------------------------------------------------- sample by sample


def compare(first: Entry, second: Entry) -> dict[str, Any] | None:
    """How the answers of two models to the same questions differ; None if questions have no score, or it is a loss.

    `agreement`: share of equal answers; `gained` and `lost`: questions that only the first, only the second answered
    right (score of at least 1/2); `p`: two-sided exact McNemar test of gained against lost.
    """
    common = _pairs(first, second)
    if not common or not first.output.get("higher_is_better", True):
        return None
    gained, lost = map(len, flipped(first, second))
    same = sum(_plain(a["prediction"]) == _plain(b["prediction"]) for a, b in common)
    return {"agreement": same / len(common), "gained": gained, "lost": lost, "p": mcnemar(gained, lost)}


Pair = tuple[dict[str, Any], dict[str, Any]]  # lines of two models' samples.jsonl on one question


def _pairs(first: Entry, second: Entry) -> list[Pair]:
    """What both models answered, question by question."""
    ours, theirs = _samples(first), _samples(second)
    return [(ours[i], theirs[i]) for i in ours if i in theirs]


def flipped(first: Entry, second: Entry) -> tuple[list[Pair], list[Pair]]:
    """Questions that only the first, and that only the second model answered right, in the data's order."""
    common = _pairs(first, second)
    return (
        [(a, b) for a, b in common if a["score"] >= 0.5 > b["score"]],
        [(a, b) for a, b in common if b["score"] >= 0.5 > a["score"]],
    )


def flip_rows(pruned: Entry, dense: Entry) -> list[dict[str, Any]]:
    """What `flipped` finds, as rows of one table; `gained` says whether the pruned model was the one to be right."""
    return [
        {
            "no": a["doc_id"], "question": a["question"], "expected": str(a["target"]),
            "dense": str(b["prediction"]), "pruned": str(a["prediction"]), "gained": gained,
        }
        for gained, pairs in zip((True, False), flipped(pruned, dense), strict=True)
        for a, b in pairs
    ]  # fmt: skip


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value: that of `gained` among `gained + lost` throws of a fair coin."""
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def _plain(answer: Any) -> str:
    return str(answer).strip().rstrip(".").lower()


def flips(tasks: Mapping[str, tuple[Entry, Entry]], names: tuple[str, str], most: int = 50) -> str:
    """A page (Markdown) of the questions that one of two models answered right and the other wrong, task by task.

    `tasks` has the scores of both by task, `names` what to call them; at most `most` questions are listed each way.
    """
    first, second = names
    page = [f"# Answers that differ: {first} and {second}"]
    for task, (one, other) in tasks.items():
        change = compare(one, other)
        if change is None:
            continue
        gained, lost = flipped(one, other)
        page.append(
            f"## {task}\n\n{len(_samples(one))} questions, "
            f"{100 * change['agreement']:.1f} % equal answers; right only in "
            f"{first}: {change['gained']}, only in {second}: {change['lost']} (McNemar p = {change['p']:.2g})"
        )
        limit = one.output.get("limit")
        if limit is not None:
            page.append(f"Caution: limit={limit:g}, so only a part of the benchmark was used.")
        for who, pairs in ((second, lost), (first, gained)):
            rows = [[str(a["doc_id"]), a["question"], a["target"], b["prediction"], a["prediction"]] for a, b in pairs]
            if rows:
                table = ["| no. | question | expected | " + f"{second} | {first} |", "|---:|---|---|---|---|"]
                table += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows[:most]]
                if len(rows) > most:
                    table.append(f"\n... and {len(rows) - most} more")
                page.append(f"### Right only in {who}\n\n" + "\n".join(table))
    return "\n\n".join(page) + "\n"


def _cell(value: Any) -> str:
    """Text that stays within a table's cell."""
    text = str(value).strip().replace("|", "\\|").replace("<", "&lt;")
    return " ⏎ ".join(line.strip() for line in text.splitlines() if line.strip())[:400]


def cost(pruned: Mapping[str, Entry], dense: Mapping[str, Entry], plan: Plan) -> dict[str, Any]:
    """Layers and, where there are scores, parameters and samples per second (of answering, in the run that did)."""
    layers = {"layers": len(plan.kept), "layers_dense": plan.n_layers}
    if not pruned:
        return layers
    speeds = [_speed(pruned), _speed(dense)]
    if len({json.dumps(e.output["device"]) for e in (*pruned.values(), *dense.values())}) > 1:
        speeds[1] = None  # answered on another device or in other batches: no ratio
    return {
        **layers,
        "params": next(iter(pruned.values())).output["params"],
        "params_dense": next(iter(dense.values())).output["params"],
        "samples_per_second": speeds[0],
        "samples_per_second_dense": speeds[1],
    }


def _speed(entries: Mapping[str, Entry]) -> float | None:
    if any(e.output["samples_per_second"] is None for e in entries.values()):  # answered together with others
        return None
    return sum(e.output["n"] for e in entries.values()) / sum(e.output["seconds"] for e in entries.values())
