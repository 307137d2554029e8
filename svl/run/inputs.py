"""What the groups `calibration` and `benchmark` of a configuration describe."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from svl.config import plain_values
from svl.config_schema import TrainingData
from svl.core import SvlError
from svl.data.hub_data import HubSource, draw_samples
from svl.data.row_formats import DESCRIBE, RowOptions
from svl.data.sample_files import read_samples
from svl.data.samples import Samples
from svl.evaluation.settings import TaskOptions


@dataclass(frozen=True)
class CalibrationSource:
    """Where calibration samples come from: files of one's own, or a data set (`hub`), or a folder with its copy."""

    path: str
    n: int | None
    seed: int
    options: RowOptions
    hub: HubSource | None

    @property
    def on_hub(self) -> bool:
        """Whether they are fetched from the hub."""
        return self.hub is not None and not Path(self.path).expanduser().is_dir()

    def identity(self) -> dict[str, Any]:
        """What the samples of a data set depend on, for keys."""
        images = self.options.images
        options = {**asdict(self.options), "images": None if images is None else str(images)}
        return {**({} if self.hub is None else asdict(self.hub)), "options": options}

    def read(self) -> Samples:
        """The samples."""
        return draw_samples(self.hub) if self.hub else read_samples(self.path, self.n, self.seed, self.options)


def calibration_source(calibration: DictConfig) -> CalibrationSource:
    """What the settings of the group `calibration` describe.

    Raises:
        SvlError: if a setting is none that there is.
    """
    c = calibration
    options = RowOptions(
        format=c.format,
        prompt=c.prompt or DESCRIBE,
        columns=plain_values(c.columns),
        images=Path(c.images).expanduser() if c.images else None,
        turns=c.turns,
        frames=c.frames,
    )
    hub = None
    if c.format is not None and not Path(c.path).expanduser().is_file():
        hub = HubSource(
            path=c.path,
            n=c.samples,
            seed=c.seed,
            name=c.name,
            split=c.split,
            revision=c.revision,
            image_table=dict(c.image_table) or None,
            options=options,
        )
    return CalibrationSource(c.path, c.samples, c.seed, options, hub)


@contextmanager
def told_of(group: str) -> Iterator[None]:
    """Within the block, errors about samples name the settings of `group` instead of calibration's."""
    try:
        yield
    except SvlError as error:
        settings = "|".join(field.name for field in dataclasses.fields(TrainingData))
        told = re.sub(rf"\bcalibration\.(?=(?:{settings})\b)", f"{group}.", str(error))
        raise SvlError(told.replace("calibration file", f"{group} file")) from error


def task_options(benchmark: DictConfig) -> dict[str, TaskOptions]:
    """How each task of the group `benchmark` is scored."""
    limit = benchmark.limit
    if limit is not None and limit >= 1:
        limit = int(limit)
    return {
        task: TaskOptions(
            metric=settings.metric,
            limit=limit,
            max_new_tokens=benchmark.max_new_tokens or settings.max_new_tokens,
            style=settings.style,
            batch_size=benchmark.batch_size,
            include_path=benchmark.include_path,
            data=benchmark.data,
            frames=benchmark.frames,
            likelihood=benchmark.likelihood,
        )
        for task, settings in benchmark.tasks.items()
    }
