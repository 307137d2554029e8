"""The commands of svl as their users give them, in this process or in one of their own, and what they leave behind."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import svl.cli

Finished = subprocess.CompletedProcess[str]

QUIET = ("benchmark=none", "tracker=none", "paths.store=store", "paths.outputs=out")
SMALL = ("calibration.samples=4", "calibration.batch_size=2")
# No GPU, no network (see tests/conftest.py), one thread.
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run_svl(*arguments: str, cwd: Path, code: int = 0, **environment: str) -> Finished:
    """`svl` to its end, in this process: without the seconds that imports take."""
    try:
        with hydra_left_as_it_was(), hydra_not_asked_for_its_mode():
            return run_command(svl.cli.main, *arguments, cwd=cwd, code=code, **environment)
    finally:
        GlobalHydra.instance().clear()


def run_command(main: Callable[[], Any], *arguments: str, cwd: Path, code: int = 0, **environment: str) -> Finished:
    """A command's entry point, called as a script calls it: arguments, folder, environment, streams, exit status."""
    out, err, before = StringIO(), StringIO(), Path.cwd()
    status: Any = 0
    with (
        patch.dict(os.environ, {**ENVIRONMENT, **environment}, clear=True),
        patch.object(sys, "argv", [main.__module__, *arguments]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        os.chdir(cwd)
        try:
            status = main()
        except SystemExit as end:
            status = end.code
        except Exception:  # noqa: BLE001 (the interpreter catches all, too)
            traceback.print_exc()
            status = 1
        finally:
            os.chdir(before)
    if isinstance(status, str):  # as the interpreter does with sys.exit(message)
        err.write(f"{status}\n")
        status = 1
    return checked(Finished(arguments, int(status or 0), out.getvalue(), err.getvalue()), code)


def checked(finished: Finished, code: int) -> Finished:
    """What has finished, with the exit status that was expected."""
    assert finished.returncode == code, finished.stdout + finished.stderr
    return finished


@contextmanager
def hydra_left_as_it_was() -> Iterator[None]:
    """Hydra configures logging and keeps its last job's configuration: neither may reach other tests."""
    loggers = [logging.getLogger(name) for name in (None, "svl", "hydra")]
    kept = [(logger, logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    cfg = HydraConfig.instance().cfg
    try:
        yield
    finally:
        HydraConfig.instance().cfg = cfg
        for logger, level, handlers, propagate in kept:
            for handler in set(logger.handlers) - set(handlers):
                handler.close()
            logger.handlers[:] = handlers
            logger.propagate = propagate
            logger.setLevel(level)


@contextmanager
def hydra_not_asked_for_its_mode() -> Iterator[None]:
    """Hydra composes everything one more time to see whether a file sets `hydra.mode`, which none of svl's does."""
    with patch.object(Hydra, "get_mode", lambda *args, **kwargs: None):
        yield


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Plan, result and log of one run's output folder."""
    plan, result = (json.loads((folder / f"{name}.json").read_text()) for name in ("plan", "result"))
    return plan, result, (folder / "run.log").read_text()


def numbers(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result without what may differ from run to run: times, speeds, a source tree that is being edited."""
    return {k: v for k, v in result.items() if k not in ("seconds", "cost", "versions")}


def manifests(store: Path) -> dict[str, int]:
    """When each finished artifact was written."""
    return {p.relative_to(store).as_posix(): p.stat().st_mtime_ns for p in store.glob("*/*/manifest.json")}
