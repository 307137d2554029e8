"""Two runs side by side: what was set differently, which layers only one removes, what training took, and what that
changed, in pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svl.core import Plan, SvlError
from svl.evaluation import score_statistics
from svl.report.flips_page import flips_page
from svl.report.paired_tests import unlike
from svl.report.result_check import problem_of
from svl.report.results import Run, run_of
from svl.report.rows import Section, compared_runs
from svl.report.table_writers import markdown_table
from svl.store.artifacts import Entry, Store
from svl.store.contents import find_artifact
from svl.text.escaping import for_markdown

MOST = 20  # flipped questions that are listed of a benchmark and a direction
BUDGET = ("steps", "samples", "tokens", "seconds")  # of a training
IDENTITY = (
    "name",
    "model",
    "model_fingerprint",
    "strategy",
    "selector",
    "compensation",
    "recovery",
    "ratio",
    "n_remove",
    "seed",
    "limit",
    "settings",
    "versions",
)


@dataclass(frozen=True)
class ComparedRun:
    """A run, its scores as far as they are in the store, and the scales that averages divide them by.

    Attributes:
        run: with its result.
        scores: by task.
        gone: keys of scores that are not in the store any more.
        scales: by task.
    """

    run: Run
    scores: Mapping[str, Entry] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    scales: Mapping[str, float] = field(default_factory=dict)


def find_run(store: Store, word: str) -> ComparedRun:
    """The run with a key (or its beginning), or the one whose output folder (or result.json) this is.

    Raises:
        SvlError: if there is no such run, or several, or it cannot be read.
    """
    place = Path(word)
    file = place / "result.json" if place.is_dir() else place
    entry = _run_of_file(store, file) if file.is_file() else store.read(find_artifact(store, word, stage="run"))
    if entry is None:
        raise SvlError(f"run {word} is damaged: run it again, or remove it (svl-report gc)")
    if problem := problem_of(entry.output):
        raise SvlError(f"run {entry.key} is damaged, or of another version of svl: {problem}")
    keys = (entry.output.get("keys") or {}).get("evaluate", [])
    found = {key: store.read(store.root / "score" / key) for key in keys}
    scores = {score.output["task"]: score for score in found.values() if score}
    gone = tuple(key for key, score in found.items() if score is None)
    return ComparedRun(run_of(entry), scores, gone, entry.manifest["inputs"].get("scales") or {})


def _run_of_file(store: Store, file: Path) -> Entry:
    """The run whose result.json this is."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SvlError(f"'{file}' is no result of a run: {error}") from error
    same = [entry for entry in store.entries("run") if entry.output == result]
    if not same:
        raise SvlError(f"the run of '{file}' is not in the store {store.root}; name its store with store=DIR")
    return same[-1]


def compare_runs(first: ComparedRun, second: ComparedRun) -> str:
    """A page (Markdown) about two runs, called A and B."""
    a, b = first.run, second.run
    parts = [
        f"# {_title(a)} and {_title(b)}",
        f"A is run {a.key}, B is run {b.key}.",
        "## Settings that differ",
        _settings(a, b),
        "## Layers",
        _layers(a, b),
        *_training(a, b),
        "## Metrics",
        *_metrics(first, second),
    ]
    return "\n\n".join(parts) + "\n"


def _title(run: Run) -> str:
    result = run.result
    return for_markdown(f"{result['model']} {result['strategy']} {100 * result['ratio']:g} %")


def _settings(a: Run, b: Run) -> str:
    """A table of the settings that differ."""
    ours, theirs = (dict(_leaves({name: run.result.get(name) for name in IDENTITY})) for run in (a, b))
    names = [name for name in dict.fromkeys((*ours, *theirs)) if ours.get(name) != theirs.get(name)]
    lines = [[name.removeprefix("settings."), ours.get(name, "–"), theirs.get(name, "–")] for name in names]
    safe = [[for_markdown(cell) for cell in line] for line in lines]
    return markdown_table(["setting", "A", "B"], safe, "lll") if safe else "None."


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as ("selector.p", "0.5")."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)


def _layers(a: Run, b: Run) -> str:
    """Both plans as lines of one letter per layer, and the layers that one of them removes."""
    plans = (a.plan, b.plan)
    ruler = "".join(f"{i:<10}" for i in range(0, max(plan.n_layers for plan in plans), 10)).rstrip()
    lines = [f"   {ruler}"]
    for name, plan in zip("AB", plans, strict=True):
        lines.append(f"{name}  " + _line(plan))
    drawn = "```\n" + "\n".join(lines) + "\n```"
    if plans[0].n_layers != plans[1].n_layers:
        return f"The models have different depths.\n\n{drawn}"
    ours, theirs = (set(plan.removal_names) for plan in plans)
    listed = {"only A": ours - theirs, "only B": theirs - ours, "both": ours & theirs}
    found = "; ".join(f"{who}: {', '.join(_by_layer(names)) or 'none'}" for who, names in listed.items())
    parts = "; a: without attention, m: without MLP" if any(plan.sublayers for plan in plans) else ""
    return f"{drawn}\n\nRemoved (#{parts}) by {found}."


def _line(plan: Plan) -> str:
    """A letter for every layer."""
    marks = dict.fromkeys(plan.removed, "#") | {i: role[0] for i, role in plan.sublayers}
    return "".join(marks.get(i, ".") for i in range(plan.n_layers))


def _by_layer(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: int(name.partition(".")[0]))


def _training(a: Run, b: Run) -> list[str]:
    """What recovery took in each, if it trained either."""
    spent = [run.result.get("training") for run in (a, b)]
    if not any(spent):
        return []
    lines = [[name, *(f"{taken.get(name, '–')}" if taken else "0" for taken in spent)] for name in BUDGET]
    lines.append(["device", *(for_markdown(run.trained_on or "–") for run in (a, b))])
    return ["## Training", markdown_table(["", "A", "B"], lines, "lrr")]


# ------------------------------------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class TaskComparison:
    """What two runs' answers to one task tell together.

    Attributes:
        cells: equal answers, right only in A, right only in B, p.
        error: standard error of the difference of the main metrics, where answers can be paired.
        pair: the scores, if answers can be compared question by question.
        problem: why they cannot.
    """

    cells: tuple[str, ...] = ("–",) * 4
    error: float | None = None
    pair: tuple[Entry, Entry] | None = None
    problem: str | None = None


def _compare_task(ours: Entry | None, theirs: Entry | None) -> TaskComparison:
    if ours is None or theirs is None:
        return TaskComparison()
    if problem := unlike(ours, theirs):
        return TaskComparison(problem=problem)
    change = score_statistics.compare_answers(ours, theirs)
    if change is None:
        return TaskComparison()
    p = "–" if change["p"] is None else f"{change['p']:.2g}"
    cells = (f"{100 * change['agreement']:.1f} %", str(change["gained"]), str(change["lost"]), p)
    return TaskComparison(cells, score_statistics.change_error(ours, theirs), (ours, theirs))


def _metrics(first: ComparedRun, second: ComparedRun) -> list[str]:
    """Main metrics with their paired differences, and the questions that flipped."""
    a, b = first.run, second.run
    tasks = [task for task in a.tasks if task in b.tasks]
    compared = {task: _compare_task(first.scores.get(task), second.scores.get(task)) for task in tasks}
    errors: list[float] = []  # of the tasks' differences, as fractions of their scales
    lines = []
    for task, found in compared.items():
        error = None if found.error is None else found.error / first.scales.get(task, 1)
        errors += [] if error is None else [error]
        lines.append([for_markdown(task), *_difference(a, b, task, error), *found.cells])
    is_complete = len(errors) == len(a.tasks) == len(b.tasks) > 0
    average_error = math.hypot(*errors) / len(errors) if is_complete else None
    lines.append(["average", *_difference(a, b, None, average_error), *TaskComparison().cells])
    head = ["benchmark", "A", "B", "A − B", "equal answers", "right only in A", "right only in B", "p (McNemar)"]
    text = [markdown_table(head, lines, "l" + "r" * 7), *_metric_notes(first, second, compared)]
    pairs = {task: found.pair for task, found in compared.items() if found.pair}
    if pairs:
        text.append("±: standard error of the difference, from pairs of answers to the same question.")
        text.append(flips_page(pairs, ("A", "B"), MOST, level=2).strip())
    return text


def _metric_notes(first: ComparedRun, second: ComparedRun, compared: Mapping[str, TaskComparison]) -> list[str]:
    """What cannot be compared, and why."""
    notes = [
        f"Answers to {for_markdown(task)} cannot be compared question by question: {found.problem}."
        for task, found in compared.items()
        if found.problem
    ]
    only = sorted(set(first.run.tasks) ^ set(second.run.tasks))
    if only:
        notes += [f"Scored by one of them only: {for_markdown(', '.join(only))}."]
        notes += ["The averages are over different benchmarks."]
    for name, run in (("A", first.run), ("B", second.run)):
        if run.average_problem:
            notes.append(f"No average of {name}, as it would mean nothing: {for_markdown(run.average_problem)}.")
    if gone := sorted({*first.gone, *second.gone}):
        notes.append(f"No longer in the store, so without pairs: scores {for_markdown(', '.join(gone))}.")
    return notes


def _difference(a: Run, b: Run, task: str | None, error: float | None) -> list[str]:
    """Two values of a benchmark (None: the averages) and their difference, in percent where all are fractions."""
    sections: list[Section] = [compared_runs("", [run])[0] for run in (a, b)]
    scale = min(section.scale(task) for section in sections)
    places = 3 if sections[0].lower_is_better(task) else 1
    x, y = (run.main_metric(task).get("value") for run in (a, b))
    cells = ["–" if value is None else f"{scale * value:.{places}f}" for value in (x, y)]
    if x is None or y is None:
        return [*cells, "–"]
    gap = f"{scale * (x - y):+.{places}f}"
    return [*cells, gap if error is None else f"{gap} ± {scale * error:.{places}f}"]
