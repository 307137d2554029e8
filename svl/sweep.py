"""What concerns a sweep as a whole: how many jobs it has, what they can share, which of them failed and why.

Hydra expands a sweep and hands every job to a launcher, whichever that is; jobs know nothing of each other, and share
finished stages through the store. With `together` above 1, the plans of all jobs are made before the first one starts,
and those of one model are evaluated together (see svl.prefix); the jobs then find their scores in the store.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from svl import parallel
from svl.core import Plan, SvlError

if TYPE_CHECKING:
    from svl.pipeline import Run
    from svl.store import Entry

log = logging.getLogger(__name__)


class Sweep(Callback):
    """Before the first job: tells them how many they are, since when and where (environment variables SVL_JOBS,
    SVL_BEGAN and SVL_SWEEP), and evaluates together what can be.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Expand the sweep as the basic sweeper will. (One that searches decides on jobs as it goes.)"""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
        from hydra.core.override_parser.overrides_parser import OverridesParser

        os.environ["SVL_BEGAN"], os.environ["SVL_SWEEP"] = str(time.time()), str(config.hydra.sweep.dir)
        if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
            return
        params = config.hydra.sweeper.get("params") or {}
        overrides = [f"{k}={v}" for k, v in params.items()] + list(config.hydra.overrides.task)
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        jobs = [job for batch in BasicSweeper.split_arguments(parser.parse_overrides(overrides), None) for job in batch]
        os.environ["SVL_JOBS"] = str(len(jobs))
        loader = GlobalHydra.instance().config_loader()
        loader.load_sweep_config = _Once(loader)  # type: ignore[method-assign]
        if config.together > 1:
            with _announced():
                share(config, jobs)


class _Once:
    """Composes every job of a sweep once, which takes 0.1 s: Hydra asks for all of them first, to see that they are
    valid, then for each to run it, and `share` does in between. In other processes jobs are composed as ever.
    """

    most = 1000  # kept, of 0.15 MB each

    def __init__(self, loader: Any):
        self.loader, self.made = loader, dict[tuple[str, ...], DictConfig]()

    def __call__(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        if (key := tuple(sweep_overrides)) in self.made:
            return copy.deepcopy(self.made[key])
        function, arguments = self.__reduce__()
        made: DictConfig = function(*arguments)(master_config, sweep_overrides)
        if len(self.made) < self.most:
            self.made[key] = copy.deepcopy(made)
        return made

    def __reduce__(self) -> Any:
        return partial, (type(self.loader).load_sweep_config, self.loader)


def share(config: DictConfig, jobs: Sequence[Sequence[str]]) -> None:
    """Put the scores of all jobs into the store that can be had together. What goes wrong is said, and left to the job.

    Args:
        config: of the sweep, with its `hydra` part.
        jobs: the overrides of each.
    """
    from svl.pipeline import Run

    if parallel.size() > 1:
        log.warning(
            "together=%d is for single processes; under torchrun, plans are evaluated one by one", config.together
        )
        return
    wanted: list[Wanted] = []
    for number, overrides in enumerate(jobs):
        log.info("[%d/%d] plan: %s", number + 1, len(jobs), " ".join(overrides))
        try:
            cfg = GlobalHydra.instance().config_loader().load_sweep_config(config, list(overrides))
            with open_dict(cfg):
                del cfg["hydra"]
            OmegaConf.set_struct(cfg, True)
            wanted += scores_of(Run(cfg, Path(os.environ["SVL_SWEEP"])))
        except Exception as error:  # noqa: BLE001 (the job itself will fail in the same way, and be reported)
            log.warning("  cannot be planned: %s", error)
    for family in families(wanted, config.together):
        try:
            evaluate(family)
        except SvlError as error:
            log.warning("  cannot be evaluated together, so each is by itself: %s", error)


@dataclass(frozen=True)
class Wanted:
    """A score that a job needs and the store lacks."""

    run: Run
    plan: Plan
    patch: Entry | None
    task: str
    inputs: dict[str, Any]  # of its key

    @property
    def family(self) -> str:
        """Equal for scores that differ in the plan only."""
        return json.dumps({k: v for k, v in self.inputs.items() if k not in ("removed", "weights")}, sort_keys=True)


def scores_of(run: Run) -> Iterator[Wanted]:
    """Make the plan of a run and its patch; the scores it lacks, dense ones included.

    What pruned models are combined with makes them too different to share anything.
    """
    _, _, plan, patch = run.prepare()
    plans = [(Plan(plan.n_layers, ()), None), *([] if run.combined else [(plan, patch)])]
    for which, weights in plans:
        for task in () if run.serves else filter(run.answers, run.tasks):
            inputs = run.score_inputs(which, weights, task)
            if run.store.get("score", inputs) is None:
                yield Wanted(run, which, weights, task, inputs)


def families(wanted: Sequence[Wanted], most: int) -> Iterator[list[Wanted]]:
    """Different scores of one family, at most so many at once; none is alone."""
    found: dict[str, dict[str, Wanted]] = defaultdict(dict)
    for score in wanted:
        found[score.family].setdefault(json.dumps(score.inputs, sort_keys=True), score)
    for family in (list(scores.values()) for scores in found.values()):
        # deep plans with deep ones: neighbours have the longest beginning in common
        family.sort(key=lambda score: min(score.plan.removed, default=score.plan.n_layers), reverse=True)
        for start in range(0, len(family), most):
            if len(part := family[start : start + most]) > 1:
                yield part


def evaluate(family: Sequence[Wanted]) -> None:
    """Score one family and store every score under its own key.

    Raises:
        SvlError: if its models cannot be evaluated together.
    """
    from svl.evaluate import evaluate_together

    first = family[0].run
    scratch = first.store.root / "tmp" / f"together-{os.getpid()}"
    folders = [scratch / str(k) for k in range(len(family))]
    log.info("%s: %d plans together", family[0].task, len(family))
    try:
        for folder in folders:
            folder.mkdir(parents=True)
        models = [first.prune(score.plan, score.patch) if score.plan.removed else first.dense for score in family]
        found = evaluate_together(models, family[0].task, folders, **first.evaluation(family[0].task))
        for score, model, folder, scores in zip(family, models, folders, found, strict=True):
            output = {**scores, "params": model.parameters(), "work": scores["seconds"]}
            _store(score, folder, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _store(score: Wanted, made: Path, output: dict[str, Any]) -> None:
    def build(folder: Path) -> dict[str, Any]:
        for file in made.iterdir():
            file.rename(folder / file.name)
        return output

    score.run.store.make("score", score.inputs, build)


@contextmanager
def _announced() -> Iterator[None]:
    """svl's messages on the console, as in a job; Hydra sets up no logging outside of jobs."""
    handler, logger = logging.StreamHandler(sys.stdout), logging.getLogger("svl")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


# ------------------------------------------------------------------------------------------------ afterwards


def _files(name: str) -> list[Path]:
    """The files of this name in the folders of this process's sweep, in the order of jobs; none without a sweep."""
    folder = os.environ.get("SVL_SWEEP")
    found = Path(folder).glob(f"*/{name}") if folder else ()
    return sorted(found, key=lambda file: (len(file.parent.name), file.parent.name))


def failures() -> dict[str, str]:
    """Jobs of the sweep that failed: their output folders, and why in one line."""
    return {str(file.parent): _reason(file.read_text(encoding="utf-8")) for file in _files("failed.txt")}


def _reason(text: str) -> str:
    """The last exception's own line in a traceback."""
    lines = [line for line in text.splitlines() if line and not line.startswith((" ", "\t"))]
    return lines[-1].partition("svl.core.SvlError: ")[2] or lines[-1] if lines else "unknown"


def repeats() -> list[str]:
    """Ratios of the sweep that come to the same layers: a line for each group of jobs that differ in nothing else."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for file in _files("result.json"):
        result = json.loads(file.read_text(encoding="utf-8"))
        names = ("model", "strategy", "selector", "compensation", "seed", "n_remove", "settings")
        groups[json.dumps([result[name] for name in names], sort_keys=True)].append(result)
    found = set()
    for same in groups.values():
        if len(ratios := sorted({result["ratio"] for result in same})) > 1:
            plan = same[0]["plan"]
            removed = f"the same {len(plan['removed'])} of {plan['n_layers']} layers of {same[0]['model']}"
            found.add(f"ratios {', '.join(f'{r:g}' for r in ratios)} are {removed}, so they were evaluated once")
    return sorted(found)
