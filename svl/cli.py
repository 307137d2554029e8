"""The `svl` command: a Hydra application. Imports no torch, so that --help, --cfg and completion stay fast."""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

import hydra
from hydra._internal.utils import get_args
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from svl import config, parallel, sweep
from svl.core import SvlError, did_you_mean
from svl.store import cannot_write

log = logging.getLogger(__name__)
config.register()


@hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")
def app(cfg: DictConfig) -> float | None:
    """Run one configuration; its average over the benchmark's tasks, for sweepers that search."""
    if parallel.rank() > 0:
        logging.getLogger("svl").setLevel(logging.ERROR)
    info = HydraConfig.get()
    sweeping = info.mode == RunMode.MULTIRUN
    if not sweeping and (swept := info.sweeper.get("params")):
        log.warning("this experiment is a sweep over %s; add -m to run all of it", ", ".join(swept))
    folder = Path(info.runtime.output_dir)
    changed = " ".join(o for o in info.overrides.task if not o.startswith("experiment="))
    count = progress(int(info.job.num)) if sweeping else ""
    log.info("%s%s", count, changed or f"strategy={info.runtime.choices['strategy']} ratio={cfg.ratio}")
    try:
        from svl.pipeline import run

        if os.environ.get("SVL_LEASE"):
            parallel.lease()
        result = run(cfg, folder, Path(info.sweep.dir) if sweeping else None)
    except Exception as error:
        with suppress(OSError):  # the disk may be full
            (folder / "failed.txt").write_text("".join(traceback.format_exception(error)))
        line = mistake(error)
        if line and not sweeping:
            sys.exit(f"error: {line}")
        log.error("  failed: %s", line or repr(error))  # a sweep goes on with its other jobs and fails at its end
        raise
    log.info("  results in %s", folder)
    average = result.get("average")
    return average["value"] if average else None


def progress(done: int) -> str:
    """ "[3/12, about 40 s left] ": place of a job in its sweep, the time judged by the jobs before it."""
    jobs, began = os.environ.get("SVL_JOBS"), os.environ.get("SVL_BEGAN")
    if not jobs or not began:
        return f"[{done + 1}] "
    left = (time.time() - float(began)) / done * (int(jobs) - done) if done else None
    return f"[{done + 1}/{jobs}" + (f", about {left:.0f} s left] " if left is not None else "] ")


def main() -> None:
    """Entry point: mistakes in the input become one line and exit code 1; bugs keep their traceback."""
    if parallel.rank() > 0:  # of several processes, the first one speaks and writes
        scratch = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
        sys.argv += [f"hydra.run.dir={scratch}", f"hydra.sweep.dir={scratch}"]
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        app()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets Hydra's exceptions reach us instead of being printed by it
    try:
        app()
    except Exception as error:
        if failed := sweep.failures():
            listing = "".join(f"\n  {folder}: {reason}" for folder, reason in failed.items())
            of = f" of {os.environ['SVL_JOBS']}" if "SVL_JOBS" in os.environ else ""
            sys.exit(f"error: {len(failed)}{of} jobs failed (each folder has failed.txt and run.log):{listing}")
        if line := mistake(error):
            sys.exit(f"error: {line}")
        raise
    finally:
        for line in sweep.repeats():
            print(f"note: {line}", file=sys.stderr)


def mistake(error: Exception) -> str | None:
    """The one line to show for an error that a person can mend; None for a bug."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = error.__cause__ or error.__context__
        return explain(cause if isinstance(cause, OmegaConfBaseException) else error, error)
    return str(error) if isinstance(error, SvlError) else cannot_write(error)


def explain(error: Exception, outer: Exception) -> str:
    """One line for a composition error, with what was probably meant."""
    text = f"{outer}\n{error}"
    if found := re.search(r"Could not find '(\w+)/([^']*)'", text):
        group, choice = found.groups()
        options = sorted({p.stem for folder in searched() for p in (folder / group).glob("*.yaml")})
        return f"there is no {group} '{choice}'{did_you_mean(choice, options)}; choices: {', '.join(options)}"
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{found.group(1)} names several values: add -m to run all of them, or brackets to make it a list"
    path = re.search(r"full_key: (\S+)", text)
    if found := re.search(r"Key '([^']+)' (?:is )?not in |Could not override '([^']+)'", text):
        key = path.group(1) if path else found.group(1) or found.group(2)
        known = neighbours(key)
        listing = f"; known here: {', '.join(known)}" if known else ""
        return f"there is no setting '{key}'{did_you_mean(key, known)}{listing}"
    line = next(s for s in str(error).splitlines() if s.strip())
    return f"{path.group(1)}: {line}" if path else line


def searched() -> list[Path]:
    """Folders that configuration is composed from."""
    own = get_args().config_dir
    return [config.CONF, *([Path(own).absolute()] if own else [])]


def neighbours(key: str) -> list[str]:
    """The settings next to `key` in the composed configuration of this command line without its wrong part."""
    where = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in searched()[1:])}]"]
    choices = [
        a
        for a in sys.argv[1:]
        if re.fullmatch(r"(model|strategy|selector|compensation|quantization|visual_tokens|benchmark)=\w+", a)
    ]
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        try:
            cfg = hydra.compose("config", overrides=where + choices)
        except (HydraException, OmegaConfBaseException):  # the wrong part is in the chosen file itself
            cfg = OmegaConf.structured(config.Svl)
    parent, _, _ = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if not isinstance(node, DictConfig):
        return []
    return [f"{parent}.{k!s}" if parent else str(k) for k in node if k != "_target_"]


if __name__ == "__main__":
    main()
