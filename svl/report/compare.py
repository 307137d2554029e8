"""Two runs side by side: what was set differently, which layers only one removes, and what that changed, in pairs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from svl import results
from svl.core import SvlError
from svl.report.contents import find
from svl.report.rows import Run, main_metric, sections
from svl.store import Entry, Store

MOST = 20  # flipped questions that are listed of a benchmark and a direction
SETTINGS = ("name", "model", "model_fingerprint", "strategy", "selector", "compensation", "ratio", "n_remove", "seed",
            "limit", "settings", "versions")  # fmt: skip


def run_of(store: Store, word: str) -> Entry:
    """The run with a key (or its beginning), or the one whose output folder (or result.json) this is.

    Raises:
        SvlError: if there is no such run, or several.
    """
    place = Path(word)
    file = place / "result.json" if place.is_dir() else place
    if not file.is_file():
        found = store.read(find(store, word, stage="run"))
        if found is None:
            raise SvlError(f"run {word} is damaged: run it again, or remove it (svl-report gc)")
        return found
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SvlError(f"'{file}' is no result of a run: {error}") from error
    same = [entry for entry in store.entries("run") if entry.output == result]
    if not same:
        raise SvlError(f"the run of '{file}' is not in the store {store.root}; name its store with store=DIR")
    return same[-1]


def compare(store: Store, first: Entry, second: Entry) -> str:
    """A page (Markdown) about two runs, called A and B.

    Raises:
        SvlError: if a manifest lacks what a comparison needs.
    """
    a, b = first.output, second.output
    try:
        parts = [
            f"# {_title(a)} and {_title(b)}",
            f"A is run {first.key}, B is run {second.key}.",
            "## Settings that differ", _settings(a, b),
            "## Layers", _layers(a, b),
            "## Metrics", *_metrics(store, first, second),
        ]  # fmt: skip
    except (KeyError, TypeError) as error:
        raise SvlError(f"these runs are of another version of svl (problem: {error})") from error
    return "\n\n".join(parts) + "\n"


def _title(run: Run) -> str:
    return f"{run['model']} {run['strategy']} {100 * run['ratio']:g} %"


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as ("selector.p", "0.5")."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)


def _settings(a: Run, b: Run) -> str:
    ours, theirs = (dict(_flat({name: run.get(name) for name in SETTINGS})) for run in (a, b))
    names = [name for name in dict.fromkeys((*ours, *theirs)) if ours.get(name) != theirs.get(name)]
    lines = [[name.removeprefix("settings."), ours.get(name, "–"), theirs.get(name, "–")] for name in names]
    return _table(["setting", "A", "B"], lines) if lines else "None."


def _layers(a: Run, b: Run) -> str:
    """Both plans as lines of one letter per layer, and the layers that one of them removes."""
    ours, theirs = set(a["plan"]["removed"]), set(b["plan"]["removed"])
    depths = [run["plan"]["n_layers"] for run in (a, b)]
    ruler = "".join(f"{i:<10}" for i in range(0, max(depths), 10)).rstrip()
    strips = [
        "".join("#" if i in gone else "." for i in range(n)) for n, gone in zip(depths, (ours, theirs), strict=True)
    ]
    lines = [f"   {ruler}", *(f"{name}  {strip}" for name, strip in zip("AB", strips, strict=True))]
    if depths[0] != depths[1]:
        return "The models have different depths.\n\n```\n" + "\n".join(lines) + "\n```"
    listed = {"only A": ours - theirs, "only B": theirs - ours, "both": ours & theirs}
    found = "; ".join(f"{who}: {', '.join(map(str, sorted(layers))) or 'none'}" for who, layers in listed.items())
    return "```\n" + "\n".join(lines) + f"\n```\n\nRemoved (#) by {found}."


def _metrics(store: Store, first: Entry, second: Entry) -> list[str]:
    """Main metrics with their paired differences, and the questions that flipped."""
    (ours, lost_a), (theirs, lost_b) = (_scores(store, run) for run in (first, second))
    lines: list[list[str]] = []
    pairs: dict[str, tuple[Entry, Entry]] = {}
    errors: list[float | None] = []  # of the tasks' differences, as fractions of their scales
    notes: list[str] = []
    scales = first.manifest["inputs"].get("scales") or {}
    tasks = [task for task in first.output["scores"] if task in second.output["scores"]]
    for task in tasks:
        error, beside = None, ["–"] * 4
        if task in ours and task in theirs:
            if problem := _unlike(ours[task], theirs[task]):
                notes.append(f"{task} cannot be compared question by question: {problem}.")
            elif change := results.compare(ours[task], theirs[task]):
                pairs[task] = (ours[task], theirs[task])
                error = results.change_error(*pairs[task])
                beside = [f"{100 * change['agreement']:.1f} %", str(change["gained"]), str(change["lost"])]
                beside.append(f"{change['p']:.2g}")
        errors.append(None if error is None else error / scales.get(task, 1))
        lines.append([task, *_difference(first.output, second.output, task, error), *beside])
    known = [error for error in errors if error is not None]
    alike = len(known) == len(first.output["scores"]) == len(second.output["scores"]) > 0
    error = math.hypot(*known) / len(known) if alike else None
    lines.append(["average", *_difference(first.output, second.output, None, error), *["–"] * 4])
    head = ["benchmark", "A", "B", "A − B", "equal answers", "right only in A", "right only in B", "p (McNemar)"]
    only = sorted(set(first.output["scores"]) ^ set(second.output["scores"]))
    notes += [f"Scored by one of them only: {', '.join(only)}."] if only else []
    notes += ["The averages are over different benchmarks."] if only else []
    gone = sorted({*lost_a, *lost_b})
    notes += [f"No longer in the store, so without pairs: scores {', '.join(gone)}."] if gone else []
    text = [_table(head, lines), *notes]
    if pairs:
        text.append("±: standard error of the difference, from pairs of answers to the same question.")
        flips = results.flips(pairs, ("A", "B"), MOST).partition("\n\n")[2].strip()
        text += ["## Answers that differ", re.sub(r"^#", "##", flips, flags=re.MULTILINE)]
    return text


def _difference(a: Run, b: Run, task: str | None, error: float | None) -> list[str]:
    """Two values of a benchmark (None: the averages) and their difference, in percent where all are fractions."""
    both = [sections("", [run])[0] for run in (a, b)]
    scale = min(section.scale(task) for section in both)
    places = 3 if both[0].lower(task) else 1
    x, y = (main_metric(run, task).get("value") for run in (a, b))
    gap = "–" if x is None or y is None else f"{scale * (x - y):+.{places}f}"
    gap += "" if error is None else f" ± {scale * error:.{places}f}"
    return [*("–" if value is None else f"{scale * value:.{places}f}" for value in (x, y)), gap]


def _scores(store: Store, run: Entry) -> tuple[dict[str, Entry], list[str]]:
    """The scores of a run by task, and the keys of those that are gone."""
    keys = run.output["keys"]["evaluate"]
    found = {key: store.read(store.root / "score" / key) for key in keys}
    return {e.output["task"]: e for e in found.values() if e}, [key for key, e in found.items() if e is None]


def _unlike(first: Entry, second: Entry) -> str | None:
    """Why two scores of one task are not of the same questions, or None."""
    differences = {
        "benchmark": "the benchmark's files differ",
        "metric": "the metrics differ",
        "limit": "limits differ",
    }
    for name, what in differences.items():
        if first.manifest["inputs"].get(name) != second.manifest["inputs"].get(name):
            return what
    return None
