"""Configuration: the schema of the root and of every group, and the one place that builds objects from it.

Method groups (selector, strategy, compensation, tracker) are frozen dataclasses named by `_target_`; the dataclass is
the schema, so its YAML is checked against its fields. The other groups are plain values with the schemas below.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from svl.core import SvlError, did_you_mean, layers_to_remove, one_of

PACKAGE = Path(__file__).parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"  # installed, or a checkout
METHODS = ("selector", "strategy", "compensation", "quantization", "visual_tokens", "tracker")


@dataclass
class Model:
    """What is pruned: a checkpoint folder or hub id."""

    path: str = MISSING
    name: str | None = None  # in plans and reports; default: last part of the path
    revision: str | None = None
    dtype: str = "auto"  # auto (as stored) | float32 | bfloat16 | float16
    device: str = "auto"
    offload: bool = False  # leave decoder layers on disk and read each once per calibration pass: for large models
    prompt: str = "chat"  # how conversations are written: chat (the checkpoint's template) | a style of svl.prompts
    image_processor: dict[str, Any] = field(default_factory=dict)  # its settings, such as `size`: caps visual tokens
    layers: str | None = None  # dotted path of the decoder layers, where structure does not tell
    image_token: Any = None  # the image placeholder or its id, where config and processor do not tell
    protect: Any = "auto"  # layers that must stay: auto (those that others depend on) | none | a list
    trust_remote_code: bool = False


@dataclass
class Calibration:
    """Samples that statistics are measured on."""

    path: str = MISSING  # a file, a folder of images, or (with `format`) a data set of the hub or a copy of it
    format: str | None = None  # how rows of a data set become samples, see svl.data; null: own files
    name: str | None = None  # configuration of the data set
    split: str = "train"
    revision: str | None = None
    images: dict[str, str] = field(default_factory=dict)  # {name: configuration with the images, key: column}
    prompt: str | None = None  # asked about images without a question
    samples: int | None = None  # null: all; else a subset drawn by `seed`
    seed: int = 0  # of the subset; independent of the root seed, so that random strategies share a calibration
    batch_size: int = 8
    statistics: list[str] = field(
        default_factory=lambda: ["cosine", "windows", "attention"]
    )  # measured in the one pass


@dataclass
class Task:
    """One lmms-eval task of a benchmark."""

    metric: str = MISSING  # the main one, in averages
    higher_is_better: bool = True
    scale: float = 1.0  # divides the main metric in averages (MME: 2000)
    max_new_tokens: int | None = None  # cap per answer; null: the task's own
    style: str = "default"  # variant of the task's prompts


@dataclass
class Benchmark:
    """What models are scored on."""

    name: str = MISSING
    tasks: dict[str, Task] = field(default_factory=dict)
    include_path: str | None = None  # folder of task YAML files besides svl's and lmms-eval's own
    data: str | None = None  # folder with copies of the data sets, named like them; null: the hub or its cache
    limit: float | None = None  # first samples of each task only (below 1: share); shown wherever such a result is
    batch_size: int = 16
    max_new_tokens: int | None = None  # cap per answer of all tasks; null: each task's


@dataclass
class Evaluator:
    """What answers the questions."""

    name: str = "transformers"  # | vllm
    options: dict[str, Any] = field(default_factory=dict)  # of vllm.LLM


@dataclass
class Efficiency:
    """How speed and memory of the pruned model are measured beside the dense one, see svl.measure."""

    batch_size: int = 1
    new_tokens: int = 32  # of every answer
    warmup: int = 1  # rounds that do not count
    repeats: int = 0  # rounds; 0: nothing is measured


@dataclass
class Paths:
    """Where results go."""

    outputs: str = MISSING
    store: str = MISSING


@dataclass
class Export:
    """The pruned checkpoint."""

    path: str | None = None


@dataclass
class Svl:
    """The root."""

    model: Model = field(default_factory=Model)
    calibration: Calibration = field(default_factory=Calibration)
    selector: Any = MISSING
    strategy: Any = MISSING
    compensation: Any = MISSING
    quantization: Any = MISSING
    visual_tokens: Any = MISSING
    benchmark: Benchmark = field(default_factory=Benchmark)
    evaluator: Evaluator = field(default_factory=Evaluator)
    efficiency: Efficiency = field(default_factory=Efficiency)
    tracker: Any = MISSING
    paths: Paths = field(default_factory=Paths)
    export: Export = field(default_factory=Export)
    name: str | None = None
    ratio: float = 0.25
    n_remove: int | None = None
    seed: int = 0
    together: int = 1


def register() -> None:
    """Make schema and resolvers known to Hydra. Safe to call twice."""
    ConfigStore.instance().store(name="schema_svl", node=Svl)
    OmegaConf.register_new_resolver("svl", lambda part: str(PACKAGE / part), replace=True)
    OmegaConf.register_new_resolver("accelerators", _accelerators, replace=True)


def _accelerators() -> int:
    """How many jobs a machine can run at once: one for each accelerator; without any, one."""
    from torch import accelerator  # few configurations need it

    return max(1, accelerator.device_count())


def build(node: DictConfig, group: str) -> Any:
    """The object that a method group describes: its `_target_` dataclass with the node's other keys as fields.

    Targets must lie in `svl.` or in a package named in the environment variable SVL_PLUGINS (comma-separated).

    Raises:
        SvlError: on a target that does not exist or is not allowed, an unknown key, or a value of wrong type or range.
    """
    values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    if not isinstance(values, dict) or "_target_" not in values:
        raise SvlError(f"{group} has no _target_: name the dataclass that implements it")
    target = values.pop("_target_")
    prefixes = ["svl", *filter(None, os.environ.get("SVL_PLUGINS", "").split(","))]
    if not any(target.startswith(f"{p}.") for p in prefixes):
        raise SvlError(
            f"{group}._target_ '{target}' is outside {', '.join(prefixes)}; allow its package in SVL_PLUGINS"
        )
    module, _, name = target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SvlError(f"{group}._target_ '{target}' cannot be imported: {error}") from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise SvlError(f"{group}._target_ '{target}' is no dataclass")
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in map(str, values):
        if key not in known:
            raise SvlError(
                f"{group} has no setting '{key}'{did_you_mean(key, known)}; it has: {', '.join(known) or '-'}"
            )
    try:
        typed = OmegaConf.merge(OmegaConf.structured(_schema(cls)), values)
        plain = OmegaConf.to_container(typed, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise SvlError(f"{group}: {str(error).splitlines()[0]} (setting '{error.full_key}')") from error
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in typing.cast(dict, plain).items()})


def _schema(cls: type) -> type:
    """A mutable twin of a frozen dataclass, with tuples as lists: what OmegaConf can type-check values against."""
    hints = typing.get_type_hints(cls)
    fields: list[Any] = []
    for f in filter(lambda f: f.init, dataclasses.fields(cls)):
        hint, default = hints[f.name], f.default
        if f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        elif default is dataclasses.MISSING:
            default = MISSING
        if typing.get_origin(hint) is tuple:
            hint = list[typing.get_args(hint)[0]]  # type: ignore[misc]
            default = list(default) if default != MISSING else MISSING
        fields.append((f.name, hint, dataclasses.field(default_factory=lambda value=default: value)))  # type: ignore[misc]
    return dataclasses.make_dataclass(cls.__name__, fields)


def describe(node: DictConfig) -> dict[str, Any]:
    """A configuration node as plain data, for records."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))


def validate(cfg: DictConfig) -> dict[str, Any]:
    """Check everything that can be checked without loading the model; the method objects by group.

    Raises:
        SvlError: the first mistake, as one line.
    """
    layers_to_remove(cfg.ratio, 1)
    if cfg.n_remove is not None and cfg.n_remove < 0:
        raise SvlError(f"n_remove is {cfg.n_remove}, but must be at least 0")
    for group in ("model", "calibration", "benchmark"):
        for key in OmegaConf.missing_keys(cfg[group]):
            raise SvlError(f"{group}.{key} is not set")
    for name in (
        "calibration.batch_size",
        "calibration.samples",
        "benchmark.batch_size",
        "benchmark.max_new_tokens",
        *(f"benchmark.tasks.{task}.max_new_tokens" for task in cfg.benchmark.tasks),
    ):
        value = OmegaConf.select(cfg, name)
        if value is not None and value < 1:
            raise SvlError(f"{name} is {value}, but must be at least 1")
    for name, least in {"batch_size": 1, "new_tokens": 2, "warmup": 0, "repeats": 0}.items():
        if cfg.efficiency[name] < least:
            raise SvlError(f"efficiency.{name} is {cfg.efficiency[name]}, but must be at least {least}")
    if cfg.efficiency.repeats and cfg.model.offload:
        raise SvlError("efficiency cannot be measured with model.offload, which leaves layers on disk")
    limit = cfg.benchmark.limit
    if limit is not None and not (0 < limit < 1 or (limit >= 1 and limit == int(limit))):
        raise SvlError(f"benchmark.limit is {limit:g}, but must be a whole number of samples, or a share below 1")
    for task, settings in cfg.benchmark.tasks.items():
        if settings.scale <= 0:
            raise SvlError(f"benchmark.tasks.{task}.scale is {settings.scale:g}, but must be above 0")
    one_of("evaluator.name", cfg.evaluator.name, ("transformers", "vllm"))
    if cfg.benchmark.tasks and cfg.evaluator.name == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise SvlError("evaluator=vllm needs vLLM (pip install vllm) and a GPU that it supports")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise SvlError("evaluator=vllm starts processes itself: run it without torchrun, see evaluator.options")
    if cfg.benchmark.tasks and importlib.util.find_spec("lmms_eval") is None:
        raise SvlError("benchmarks need lmms-eval: pip install 'svl[eval]', or run with benchmark=none")
    return {group: build(cfg[group], group) for group in METHODS}
