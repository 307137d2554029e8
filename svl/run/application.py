"""The Hydra application that `svl` is. Imports no torch, so that --help, --cfg and completion stay fast."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from svl import config
from svl.processes import process_rank
from svl.run import interruption, job_records
from svl.run.hydra_internals import WithoutJobErrors
from svl.run.messages import one_line, safe_line
from svl.run.sweep import search_objective
from svl.run.time_left import start_job
from svl.store.files import write_text_whole
from svl.text.redaction import redact_text

log = logging.getLogger(__name__)
log_file = logging.getLogger("traceback")  # goes to run.log only


config.register_with_hydra()


@hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")
def app(cfg: DictConfig) -> float | None:
    """Run one configuration; for sweepers that search, what they maximise."""
    if process_rank() > 0:
        logging.getLogger("svl").setLevel(logging.ERROR)
    interruption.end_worker_on_interrupt()
    info = HydraConfig.get()
    sweep = Path(info.sweep.dir) if info.mode == RunMode.MULTIRUN else None
    folder = Path(info.runtime.output_dir)
    announce_job(cfg, info, sweep is not None)
    try:
        config.check_first(cfg)
        from svl.run.parallel import lease_accelerator
        from svl.run.pipeline import run_configuration
        from svl.run.stages import StageLog

        if os.environ.get("SVL_LEASE"):
            lease_accelerator()
        told, began = StageLog(), time.perf_counter()
        result = run_configuration(cfg, folder, sweep, told)
        work = (time.perf_counter() - began - told.shared, told.shared) if told.computed else None
        searching = sweep is not None and not info.sweeper._target_.endswith("BasicSweeper")
        objective = search_objective(result) if searching else None
    except Exception as error:
        line = report_failure(error, folder)
        if sweep is None:
            sys.exit(f"error: {safe_line(line)}")
        log.error("  failed: %s", line)  # a sweep goes on with its other jobs and fails at its end
        job_records.record_failure(sweep, info.job.num, folder, line)
        raise
    if sweep is not None and result:
        job_records.record_result(sweep, info.job.num, folder, result, work)
    log.info("  results in %s", folder)
    return objective


def announce_job(cfg: DictConfig, info: Any, sweeping: bool) -> None:
    """Log what the job is about, and its place in its sweep."""
    swept = info.sweeper.get("params")
    if swept and not sweeping:
        log.warning("this experiment is a sweep over %s; add -m to run all of it", ", ".join(swept))
    words: Any = OmegaConf.to_container(info.overrides.task, resolve=False)  # they may refer to nothing
    changed = " ".join(word for word in words if not word.startswith("experiment="))
    place = start_job(Path(info.sweep.dir), int(info.job.num)) if sweeping else ""
    log.info("%s%s", place, changed or f"strategy={info.runtime.choices['strategy']} ratio={cfg.ratio:g}")


def report_failure(error: Exception, folder: Path) -> str:
    """Write the traceback to run.log and failed.txt in the output folder; gives the line that says what happened."""
    text = redact_text("".join(traceback.format_exception(error)))
    log_file.error(text)
    with suppress(OSError):  # the disk may be full
        write_text_whole(folder / "failed.txt", text)
    line = one_line(error)
    if line is None:
        reason = " ".join(str(error).split())
        line = f"{type(error).__name__}: {reason} (please report it, with {folder / 'failed.txt'})"
    forget_locals(error)
    return line


def forget_locals(error: BaseException | None) -> None:
    """Free what the frames of an error hold, such as a model: in a sweep, errors outlive their jobs."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def run_in_one_line(work: Callable[[], Any]) -> None:
    """Do what the command line asks for; whatever ends it becomes one line and an exit code.

    Tracebacks of runs are in their run.log.
    """
    if process_rank() > 0:
        write_elsewhere()
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        work()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets Hydra's exceptions reach us instead of being printed by it
    try:
        errors: Any = WithoutJobErrors(sys.stderr)
        with interruption.orderly_end(), redirect_stderr(errors):
            work()
    except interruption.Interrupted as stop:
        if process_rank() == 0:
            print(describe_interruption(), file=sys.stderr)
        sys.exit(stop.exit_code)
    except Exception as error:
        line = describe_failed_jobs(error) or one_line(error)
        if line is None:
            raise
        sys.exit(f"error: {safe_line(line)}")
    finally:
        if sweep := os.environ.get("SVL_SWEEP"):
            for line in job_records.equal_ratios(Path(sweep)):
                print(f"note: {line}", file=sys.stderr)


def write_elsewhere() -> None:
    """Of several processes of a run, the first one speaks and writes; this one's outputs go to a temporary folder."""
    scratch = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    sys.argv += [f"hydra.run.dir={scratch}", f"hydra.sweep.dir={scratch}"]


def describe_failed_jobs(error: Exception) -> str | None:
    """Which jobs of this process's sweep failed, and why; None without a sweep, or if `error` let no job start."""
    sweep, count = os.environ.get("SVL_SWEEP"), os.environ.get("SVL_JOBS")
    if not sweep or isinstance(error, HydraException | OmegaConfBaseException):
        return None
    return job_records.describe_failures(Path(sweep), int(count) if count else None)


def describe_interruption() -> str:
    """What is kept of an interrupted run or sweep, and how to go on."""
    sweep = os.environ.get("SVL_SWEEP")
    done = ""
    if sweep:
        done = f" after {len(job_records.read_records(Path(sweep)))} of {os.environ.get('SVL_JOBS', '?')} jobs"
    return f"interrupted{done}: finished stages are kept in the store; give the same command again to go on"
