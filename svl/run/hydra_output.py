"""What Hydra writes by itself, without the secrets that are in the overrides of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from svl.store.files import write_text_whole
from svl.text.redaction import redact_text, redact_values

FILES = ("config.yaml", "hydra.yaml", "overrides.yaml")
FAST_LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # every value is text; OmegaConf's takes ten times as long


class RedactOutput(Callback):
    """Takes secrets out of Hydra's copies of the configuration, and out of what it prints about failed jobs."""

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """After the copies were written, before the job itself."""
        info = config.hydra
        if info.output_subdir is not None:
            folder = Path(info.runtime.output_dir) / info.output_subdir
            for name in FILES:
                redact_file(folder / name)
        if info.mode == RunMode.MULTIRUN:
            redact_file(Path(info.sweep.dir) / "multirun.yaml")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Before Hydra prints the overrides of a job that failed."""
        job_return.overrides = [redact_text(word) for word in job_return.overrides or ()]


def redact_file(file: Path) -> None:
    """Rewrite a YAML file without secrets; one without any is left as it is."""
    if not file.is_file():
        return
    words = yaml.load(file.read_text(encoding="utf-8"), FAST_LOADER)
    if redact_values(words) == words:
        return
    content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    redacted = redact_values(content)
    if redacted != content:
        write_text_whole(file, OmegaConf.to_yaml(OmegaConf.create(redacted)))
