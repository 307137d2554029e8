"""Which settings there are, and what numbers they may have, apart from those of methods."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from svl.config_schema import Svl
from svl.core import SvlError, check_count, did_you_mean
from svl.core.settings import LARGEST_SEED

PLAIN = ("ratio", "n_remove", "seed", "together", "model", "calibration", "benchmark", "evaluator", "efficiency")
HYDRA = "hydra"  # the key of Hydra's own settings, where a configuration has them
type_hints = cache(typing.get_type_hints)  # evaluating them takes a millisecond


def check_known(cfg: DictConfig, kind: type = Svl, where: str = "") -> None:
    """Raise SvlError on a setting that there is not: Hydra adds it, where it is written with a plus."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in map(str, cfg):
        if key == HYDRA and not where:
            continue
        if key not in fields:
            known = [where + name for name in fields]
            hint = did_you_mean(where + key, known)
            raise SvlError(f"there is no setting '{where}{key}'{hint}; known here: {', '.join(known)}")
        if dataclasses.is_dataclass(inner := type_hints(kind)[key]):
            check_known(cfg[key], typing.cast(type, inner), f"{where}{key}.")


def check_numbers(cfg: DictConfig) -> None:
    """Raise SvlError if a number is out of its range; methods check theirs."""
    for name in PLAIN:
        check_all_finite(OmegaConf.to_container(cfg[name]) if OmegaConf.is_config(cfg[name]) else cfg[name], name)
    least: dict[str, int] = dict.fromkeys(("calibration.batch_size", "calibration.samples", "calibration.frames"), 1)
    least |= dict.fromkeys(("benchmark.batch_size", "benchmark.max_new_tokens", "benchmark.frames"), 1)
    least |= {f"benchmark.tasks.{task}.max_new_tokens": 1 for task in cfg.benchmark.tasks}
    least |= {"efficiency.batch_size": 1, "efficiency.new_tokens": 2, "efficiency.warmup": 0, "efficiency.repeats": 0}
    least |= {"together": 1, "calibration.generated": 0, "calibration.generated_tokens": 1, "seed": 0}
    least |= {"calibration.seed": 0}
    check_least(cfg, least)
    for name in ("seed", "calibration.seed"):
        if (seed := OmegaConf.select(cfg, name)) is not None:
            check_count(name, seed, most=LARGEST_SEED)
    limit = cfg.benchmark.limit
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and float(limit).is_integer())):
        raise SvlError(f"benchmark.limit is {limit:g}, but must be a whole number of samples, or a share below 1")
    for task, settings in cfg.benchmark.tasks.items():
        if not settings.scale > 0:
            raise SvlError(f"benchmark.tasks.{task}.scale is {settings.scale:g}, but must be above 0")


def check_all_finite(value: Any, name: str) -> None:
    """Raise SvlError if a number is infinite or NaN, or one within a mapping or list."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            check_all_finite(inner, f"{name}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            check_all_finite(inner, f"{name}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise SvlError(f"{name} is {value:g}, but must be a finite number")


def check_least(cfg: DictConfig, least: dict[str, int], where: str = "") -> None:
    """Raise SvlError if a number, by its name, is less than it must be."""
    for name, bound in least.items():
        value = OmegaConf.select(cfg, name)
        if value is not None and value < bound:
            raise SvlError(f"{where}{name} is {value}, but must be at least {bound}")
