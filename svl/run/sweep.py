"""Before a sweep starts: how many jobs it has, whether they are well-formed, and what they can share.

Hydra expands a sweep and hands every job to a launcher, whichever that is; jobs know nothing of each other, and share
finished stages through the store. With `together` above 1, what can be scored at once is scored before the first job
starts (see svl.run.shared_scores). How jobs ended is in svl.run.job_records.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from svl.config_methods import METHODS, build_method
from svl.config_ranges import check_known
from svl.core import SvlError
from svl.evaluation import benchmarks
from svl.run import hydra_internals, time_left
from svl.run.job_records import clear_records
from svl.run.messages import SafeFormatter, safe_line
from svl.run.parallel import in_leased_process

log = logging.getLogger(__name__)


class Sweep(Callback):
    """Before the first job: notes how many there are and where (for this process, in SVL_JOBS and SVL_SWEEP), finds
    misspelt settings of all of them, and scores together what can be.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check the sweep, and expand it as the basic sweeper will. (One that searches decides on jobs as it goes.)"""
        os.environ["SVL_SWEEP"] = str(config.hydra.sweep.dir)
        os.environ.pop("SVL_JOBS", None)
        clear_records(Path(config.hydra.sweep.dir))
        try:
            if config.hydra.sweeper._target_.endswith("BasicSweeper"):
                prepare_jobs(config)
            else:
                check_search(config)
        except SvlError as error:
            sys.exit(f"error: {safe_line(str(error))}")  # Hydra makes a warning of any exception of a callback
        except (HydraException, OmegaConfBaseException):
            log.debug("a job cannot be composed; Hydra will find that, too, and end the sweep")


def prepare_jobs(config: DictConfig) -> None:
    """Count the jobs of a sweep, check them, and score together what can be.

    Raises:
        SvlError: if a job is not well-formed.
    """
    params = config.hydra.sweeper.get("params") or {}
    jobs = hydra_internals.expand_sweep([f"{k}={v}" for k, v in params.items()] + list(config.hydra.overrides.task))
    os.environ["SVL_JOBS"] = str(len(jobs))
    hydra_internals.keep_composed_jobs()
    time_left.write_jobs(Path(config.hydra.sweep.dir), check_jobs(config, jobs))
    if config.together > 1:
        from svl.run.shared_scores import make_shared_scores

        with messages_on_console():
            if leases(config):
                in_leased_process(lambda: make_shared_scores(config, jobs))
            else:
                make_shared_scores(config, jobs)


def leases(config: DictConfig) -> bool:
    """Whether the jobs of a sweep each lease an accelerator (hydra/launcher=gpus)."""
    return bool((config.hydra.job.get("env_set") or {}).get("SVL_LEASE"))


def check_jobs(config: DictConfig, jobs: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Build the methods of every job, so that a misspelt setting of the last one is found before the first one starts.

    Returns:
        Of every job, the settings of what it shares with others.

    Raises:
        SvlError: the first mistake, with the job's overrides; or if jobs sweep by themselves, see below.
    """
    checked: set[str] = set()
    shared = []
    for overrides in jobs:
        job = hydra_internals.compose_job(config, overrides)
        check_no_sweep_within(config, job)
        check_known(job)
        for group in METHODS:
            settings = json.dumps([group, OmegaConf.to_container(job[group], resolve=False)])
            if settings in checked:
                continue
            checked.add(settings)
            try:
                build_method(job[group], group)
            except SvlError as error:
                raise SvlError(f"{error} (in the job {' '.join(overrides)})") from error
        shared.append({group: OmegaConf.to_container(job[group], resolve=False) for group in time_left.SHARED})
    return shared


def check_no_sweep_within(config: DictConfig, job: DictConfig) -> None:
    """Raise SvlError if a job comes with sweep parameters of its own: Hydra would pass over them without a word.

    That is what `experiment=a,b` does: parameters of a file that is itself swept over come too late.
    """
    theirs, ours = job.hydra.sweeper.get("params") or {}, config.hydra.sweeper.get("params") or {}
    ignored = [name for name in theirs if name not in ours]
    if ignored:
        name = job.hydra.runtime.choices.get("experiment")
        raise SvlError(
            f"experiment={name} sweeps over {', '.join(ignored)}, which is impossible within another sweep: run one "
            "experiment at a time"
        )


def check_search(config: DictConfig) -> None:
    """Check a sweep that looks for the best settings.

    Raises:
        SvlError: if there is nothing to look for, or it would look for the worst.
    """
    if not config.benchmark.tasks:
        raise SvlError("a search needs scores to compare: choose a benchmark, not benchmark=none")
    direction = config.hydra.sweeper.get("direction")
    if direction is not None and str(getattr(direction, "name", direction)) != "maximize":
        raise SvlError("hydra.sweeper.direction must be maximize: a loss is handed to the search with a minus sign")
    include_path, kinds = config.benchmark.include_path, set()
    for task, settings in config.benchmark.tasks.items():
        benchmarks.check_direction(str(task), settings.metric, settings.higher_is_better, include_path)
        kinds.add(benchmarks.higher_is_better(str(task), settings.metric, include_path))
    if len(kinds) > 1:
        raise SvlError("a search cannot average losses and scores: choose a benchmark whose tasks are of one kind")


def search_objective(result: dict[str, Any]) -> float:
    """What a search maximises: the average over the benchmark's tasks; where lower values are better, its negative.

    Raises:
        SvlError: if the average is undefined.
    """
    average = result["average"]
    if average is None or average["value"] is None:
        reason = f": {note}" if (note := result.get("average_note")) else ""
        raise SvlError(
            f"the average over the benchmark is undefined for these settings, so they cannot be compared{reason}"
        )
    value = float(average["value"])
    return value if all(score.get("higher_is_better", True) for score in result["scores"].values()) else -value


@contextmanager
def messages_on_console() -> Iterator[None]:
    """svl's messages on the console, as in a job; Hydra sets up no logging outside of jobs."""
    handler, logger = logging.StreamHandler(sys.stdout), logging.getLogger("svl")
    handler.setFormatter(SafeFormatter())
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
