"""The numbers of the Short-LVLM paper, which stand beside measured rows."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from svl.report.rows import Row

SOURCE = "arXiv 2507.23362"
SIZE = re.compile(r"\d+b")  # as in 7b
METHOD = {  # what the paper calls short-lvlm: two names of the same layers
    "strategy": ("short_lvlm_paper", "short_lvlm"),
    "selector": ("tis",),
    "compensation": ("subspace",),
}


def numbers_file(name: str) -> Path:
    """A file of published numbers: in the installed package, or in the experiments of a checkout."""
    here = Path(__file__).parent
    places = (here / name, here.parents[1] / "experiments/paper" / name)
    return next((place for place in places if place.is_file()), places[0])


FILE = numbers_file("short_lvlm_main_results.csv")


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
        if row and any(row.first.result[part] not in options for part, options in METHOD.items()):
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
    return next((found for name, found in _read().items() if is_model(name, model)), None)


def is_model(name: str, model: str) -> bool:
    """Whether a paper's `name` of a model means the checkpoint `model`: all its words, but for a size that none has."""
    own = _words(model)
    sized = any(map(SIZE.fullmatch, own))
    missing = _words(name) - own
    return not missing or (not sized and all(map(SIZE.fullmatch, missing)))


def _words(name: str) -> set[str]:
    return {word.removeprefix("v") if word[1:2].isdigit() else word for word in re.findall(r"[a-z0-9.]+", name.lower())}
