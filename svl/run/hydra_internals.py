"""The only module that uses what Hydra does not promise to keep; a test imports each of these names.

Hydra 1.3 has no public way to know the jobs of a sweep before they start, to compose a job's configuration without
running it, or to read `--config-dir`.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict

MOST_COMPOSED = 1000  # jobs whose configuration is kept, of 0.15 MB each


def is_of_composing(error: BaseException) -> bool:
    """Whether an exception was raised while Hydra read and composed configuration files."""
    modules = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(module in (config_loader_impl.__name__, defaults_list.__name__) for module in modules)


def command_line_config_folder() -> Path | None:
    """The folder given by --config-dir."""
    folder = get_args().config_dir
    return Path(folder).absolute() if folder else None


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """Overrides as Hydra reads them. In a running application, `glob(...)` knows its choices."""
    running = GlobalHydra.instance()
    loader = running.config_loader() if running.is_initialized() else None
    return OverridesParser.create(config_loader=loader).parse_overrides(list(words))


def expand_sweep(words: Sequence[str]) -> list[list[str]]:
    """The overrides of every job that the basic sweeper makes of these overrides, in its order."""
    return [job for batch in BasicSweeper.split_arguments(parse_overrides(words), None) for job in batch]


def keep_composed_jobs() -> None:
    """Let Hydra compose every job of this process's sweep only once."""
    loader = GlobalHydra.instance().config_loader()
    loader.load_sweep_config = ComposeOnce(loader)  # type: ignore[method-assign]


def compose_job(master_config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The configuration of one job of a sweep, with its `hydra` part."""
    return GlobalHydra.instance().config_loader().load_sweep_config(master_config, list(overrides))


def without_hydra(job: DictConfig) -> DictConfig:
    """A job's configuration as its task function gets it."""
    with open_dict(job):
        del job["hydra"]
    OmegaConf.set_struct(job, True)
    return job


class WithoutJobErrors:
    """A stream without the line that Hydra writes where a sweep reads the result of a job that failed.

    There is no setting for it; it names one job, before svl names all that failed and why.
    """

    LINE = "Error executing job with overrides: "

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """As the stream's."""
        return len(text) if text.startswith(self.LINE) else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class ComposeOnce:
    """Composes every job of a sweep once, which takes 0.1 s: Hydra asks for all of them first, to see that they are
    valid, then for each to run it, and svl does in between. In other processes jobs are composed as ever.
    """

    def __init__(self, loader: Any):
        self.loader, self.composed = loader, dict[tuple[str, ...], DictConfig]()

    def __call__(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        key = tuple(sweep_overrides)
        if key in self.composed:
            return copy.deepcopy(self.composed[key])
        function, arguments = self.__reduce__()
        job: DictConfig = function(*arguments)(master_config, sweep_overrides)
        if len(self.composed) < MOST_COMPOSED:
            self.composed[key] = copy.deepcopy(job)
        return job

    def __reduce__(self) -> Any:
        return partial, (type(self.loader).load_sweep_config, self.loader)
