"""The numbers of the Short-LVLM paper: what of them stands beside a measured row, and measured rows in their layout."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from svl.core import SvlError
from svl.report.rows import Estimate, Row, Section

SOURCE = "arXiv 2507.23362"
NAME = "short_lvlm_main_results.csv"
HERE = Path(__file__).parent
FILE = next((p for p in (HERE / NAME, HERE.parents[1] / "experiments/paper" / NAME) if p.is_file()), HERE / NAME)
COLUMNS = ["model", "method", "pruning_ratio", "benchmark", "score", "samples_per_second"]
METHOD = {"strategy": "short_lvlm", "selector": "tis", "compensation": "subspace"}  # what the paper calls short-lvlm


@dataclass(frozen=True)
class Published:
    """What the paper says about one model.

    Attributes:
        model: its name there.
        scores: by method, ratio and benchmark, in the paper's units.
    """

    model: str
    scores: dict[tuple[str, float, str], float]

    def value(self, row: Row | None, task: str | None, tasks: Sequence[str]) -> float | None:
        """The paper's number for a row (None: the dense model) and a benchmark.

        The average over the benchmarks (None) counts only where `tasks` are all of the paper's.
        """
        of_paper = {name for _, _, name in self.scores} - {"average"}
        names = {_benchmark(name): name for name in of_paper}
        if task is None:
            name = "average" if {_benchmark(t) for t in tasks} == set(names) else None
        else:
            name = names.get(_benchmark(task))
        if row and any(row.runs[0][part] != option for part, option in METHOD.items()):
            return None
        return self.scores.get(("short-lvlm" if row else "dense", row.ratio if row else 0.0, name or ""))


def _benchmark(name: str) -> str:
    """A benchmark's name without the marks of svl and of the paper's table."""
    return name.removeprefix("svl_").removesuffix("_img")


@cache
def _read() -> dict[str, Published]:
    models: dict[str, Published] = {}
    with open(FILE, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            found = models.setdefault(line["model"], Published(line["model"], {}))
            found.scores[line["method"], float(line["pruning_ratio"]), line["benchmark"]] = float(line["score"])
    return models


def numbers(model: str) -> Published | None:
    """The paper's numbers for a model, which checkpoints write as llava-1.5-7b-hf or Qwen-VL-Chat; None if unknown.

    All words of the paper's name must be in the other; but for the size, if that gives none.
    """
    own = _words(model)
    sized = any(map(SIZE.fullmatch, own))
    for name, found in _read().items():
        missing = _words(name) - own
        if not missing or (not sized and all(map(SIZE.fullmatch, missing))):
            return found
    return None


SIZE = re.compile(r"\d+b")


def _words(name: str) -> set[str]:
    return {word.removeprefix("v") if word[1:2].isdigit() else word for word in re.findall(r"[a-z0-9.]+", name.lower())}


def layout(sections: Iterable[Section]) -> str:
    """Main metrics and averages in the layout and the units of experiments/paper (CSV), the dense model first.

    Raises:
        SvlError: if a sample limit was used: such numbers are no results.
    """
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(COLUMNS)
    for section in sections:
        first = section.runs[-1]
        if first["limit"] is not None:
            raise SvlError(f"'{section.title}' is no table for a paper: run it without benchmark.limit")
        tasks = [*section.tasks, None]
        dense = {task: Estimate(section.dense(task)) for task in tasks}
        lines = [("dense", 0.0, dense, first["cost"].get("samples_per_second_dense"))]
        for row in section.rows:
            scores = {task: row.score(task) for task in tasks}
            lines.append((row.label, row.ratio, scores, row.runs[0]["cost"].get("samples_per_second")))
        for label, ratio, scores, speed in lines:
            for task, estimate in scores.items():
                name = "average" if task is None else task.removeprefix("svl_")
                value = "" if estimate.value is None else f"{section.scale(task) * estimate.value:.1f}"
                rate = f"{speed:.2f}" if speed and task is None else ""
                table.writerow([section.model, label, ratio, name, value, rate])
    return out.getvalue()
