"""TensorBoard: a folder of event files for each run, below that of the experiment.

Written by PyTorch's own writer. The folder's name ends in the beginning of the run's key, so a run that is mirrored
again replaces itself, and the runs of a sweep are the rows of the HPARAMS tab.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svl.core import SvlError
from svl.data.pictures import open_picture
from svl.store.files import remove_path, scratch_beside
from svl.trackers.record import Record, Tracker, flatten

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)
LONGEST = 150  # characters of a folder's name; with the key's, file systems take 255 bytes


@dataclass(frozen=True)
class TensorBoard(Tracker):
    """See the module.

    Attributes:
        folder: what `tensorboard --logdir` is given.
    """

    folder: str = "outputs/tensorboard"

    def check(self) -> None:
        """See the base class."""
        if importlib.util.find_spec("tensorboard") is None:
            raise SvlError("TensorBoard is missing: pip install 'svl[tensorboard]', or set tracker=none")

    def mirror(self, record: Record) -> str | None:
        """Write a run, whole or not at all."""
        from torch.utils.tensorboard import SummaryWriter

        root = Path(self.folder).expanduser().absolute()
        target = root / _file_name(record.group) / f"{_file_name(record.name)}-{record.key}"
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = scratch_beside(target)
        try:
            with SummaryWriter(str(scratch)) as writer:
                write_events(writer, record)
            if target.exists():
                remove_path(target)
            scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        log.info("  tracked    look at it with: tensorboard --logdir %s", shlex.quote(str(root)))
        return str(target)


def _file_name(text: str) -> str:
    """A text as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9_.=+,\- ]", "_", text)[:LONGEST].lstrip(".") or "_"


def write_events(writer: SummaryWriter, record: Record) -> None:
    """Everything that a record holds; its numbers at step 0, curves with the layer as step."""
    numbers = record.summary()
    for name, value in numbers.items():
        writer.add_scalar(name, value, 0)
    for point in record.layers():
        step = int(point.pop("layer"))
        for name, value in point.items():
            writer.add_scalar(f"layers/{name}", value, step)
    for moment in record.training:
        for name, value in moment.items():
            writer.add_scalar(f"recover/{name}", value, int(moment["step"]))
    _write_hparams(writer, record, numbers)
    for title, path in record.figures.items():
        writer.add_image(f"figures/{title}", _pixels(path), 0, dataformats="HWC")
    if record.error:
        writer.add_text("error", as_code(record.error), 0)
    for title, values in (("config", record.config), ("flips", [dict(flip) for flip in record.flips])):
        if values:
            writer.add_text(title, as_code(json.dumps(values, indent=1, ensure_ascii=False, default=str)), 0)
    for kind, files in record.files.items():
        for file in files:
            writer.add_text(f"{kind}/{file.name}", as_code(file.read_text(encoding="utf-8")), 0)


def _write_hparams(writer: SummaryWriter, record: Record, numbers: Mapping[str, float]) -> None:
    """The run's row in the HPARAMS tab: its settings, and the averages to compare by."""
    from torch.utils.tensorboard.summary import hparams

    settings: dict[str, Any] = dict(tag.partition(":")[::2] for tag in record.tags)
    settings |= {name: _plain(value) for name, value in flatten(record.config) if not name.startswith("svl/")}
    averages = {name: value for name, value in numbers.items() if name in ("eval/average", "eval/retained")}
    file: Any = writer.file_writer
    for event in hparams(settings, averages):
        file.add_summary(event)  # add_hparams would make another run of it


def _plain(value: Any) -> bool | str | float | int:
    """A setting as the HPARAMS tab takes it."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)


def _pixels(path: Path) -> Any:
    """A picture as an array of [height, width, 3]."""
    import numpy as np

    return np.asarray(open_picture(path, "a figure of the run"))


def as_code(text: str) -> str:
    """Text in TensorBoard's Markdown, as a block of code: indented, so that nothing in it can end the block."""
    return "\n".join(f"    {line}" for line in text.splitlines())
