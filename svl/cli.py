"""The `svl` command: a Hydra application. Imports no torch, so that --help, --cfg and completion stay fast."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from svl import config
from svl.core import SvlError, did_you_mean

log = logging.getLogger(__name__)
config.register()


class CountJobs(Callback):
    """Tells the jobs of a sweep how many they are, through the environment variable SVL_JOBS."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Expand the sweep as the basic sweeper will."""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
        from hydra.core.override_parser.overrides_parser import OverridesParser

        params = config.hydra.sweeper.get("params") or {}
        overrides = [f"{k}={v}" for k, v in params.items()] + list(config.hydra.overrides.task)
        batches = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)
        os.environ["SVL_JOBS"] = str(sum(map(len, batches)))


@hydra.main(version_base="1.3", config_path=str(config.CONF), config_name="config")
def app(cfg: DictConfig) -> None:
    """Run one configuration."""
    info = HydraConfig.get()
    sweeping = info.mode == RunMode.MULTIRUN
    if not sweeping and (swept := info.sweeper.get("params")):
        log.warning("this experiment is a sweep over %s; add -m to run all of it", ", ".join(swept))
    folder = Path(info.runtime.output_dir)
    count = f"[{int(info.job.num) + 1}/{os.environ.get('SVL_JOBS', '?')}] " if sweeping else ""
    changed = " ".join(o for o in info.overrides.task if not o.startswith("experiment="))
    log.info("%s%s", count, changed or f"strategy={info.runtime.choices.strategy} ratio={cfg.ratio}")
    try:
        from svl.pipeline import run

        run(cfg, folder)
    except Exception as error:
        (folder / "failed.txt").write_text("".join(traceback.format_exception(error)))
        if isinstance(error, SvlError) and not sweeping:  # a sweep goes on with its other jobs and fails at its end
            sys.exit(f"error: {error}")
        raise
    log.info("  results in %s", folder)


def main() -> None:
    """Entry point: mistakes in the input become one line and exit code 1; bugs keep their traceback."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        app()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets Hydra's exceptions reach us instead of being printed by it
    try:
        app()
    except SvlError as error:
        sys.exit(f"error: {error}")
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error.__context__
        sys.exit(f"error: {explain(cause if isinstance(cause, OmegaConfBaseException) else error, error)}")


def explain(error: Exception, outer: Exception) -> str:
    """One line for a composition error, with what was probably meant."""
    text = f"{outer}\n{error}"
    if found := re.search(r"Could not find '(\w+)/([^']+)'", text):
        group, choice = found.groups()
        options = sorted(p.stem for p in (config.CONF / group).glob("*.yaml"))
        return f"there is no {group} '{choice}'{did_you_mean(choice, options)}; choices: {', '.join(options)}"
    if found := re.search(r"Key '([^']+)' (?:is )?not in (?:struct|'?(\w+)'?)", text) or re.search(
        r"Could not override '([^']+)'", text
    ):
        path = re.search(r"full_key: (\S+)", text)
        key = path.group(1) if path else found.group(1)
        known = neighbours(key)
        return f"there is no setting '{key}'{did_you_mean(key, known)}; known here: {', '.join(known)}"
    line = next(s for s in str(error).splitlines() if s.strip())
    path = re.search(r"full_key: (\S+)", text)
    return f"{path.group(1)}: {line}" if path else line


def neighbours(key: str) -> list[str]:
    """The settings next to `key` in the composed configuration of this command line without its wrong part."""
    from omegaconf import OmegaConf

    choices = [a for a in sys.argv[1:] if re.fullmatch(r"(model|strategy|selector|compensation|benchmark)=\w+", a)]
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = hydra.compose("config", overrides=choices)
    parent, _, _ = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if not isinstance(node, DictConfig):
        return list(map(str, cfg))
    return [f"{parent}.{k}" if parent else str(k) for k in node if k != "_target_"]


if __name__ == "__main__":
    main()
