"""Configuration: what Hydra is told, and what is checked before a model is loaded.

Method groups (selector, strategy, compensation, recovery, quantization, visual_tokens, tracker) are frozen dataclasses
named by `_target_`; the dataclass is the schema: any of its fields can be set, and nothing else. The other groups are
plain values with the schemas of svl.config_schema. svl.config_methods builds the objects.
"""

from __future__ import annotations

import importlib.util
import os
import typing
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from svl import plugins
from svl.config_methods import METHODS, build_method, choices_with
from svl.config_ranges import HYDRA, check_known, check_least, check_numbers
from svl.config_schema import Svl, TrainingData
from svl.core import Compensation, SvlError, layers_to_remove, one_of
from svl.core.patch import NO_STOCK_FORM, NO_TRIALS
from svl.models.options import LoadOptions

PACKAGE, CONF = plugins.PACKAGE, plugins.CONF  # svl's folder, and that of its configuration

# Settings of the group `calibration` that training does not read, and what to do instead.
NOT_OF_TRAINING = {
    "batch_size": "training takes recovery.batch_size samples at once",
    "statistics": "nothing is measured on what recovery trains on",
    **dict.fromkeys(
        ("generated", "generated_tokens"),
        "recovery writes no texts; scripts/make_generated_texts.py makes a file of them for recovery.data.path",
    ),
}
RATIO_DIGITS = 6  # of a ratio: 0.1 + 0.2 is 0.3 in every key, name and table


def register_with_hydra() -> None:
    """Make schema, resolvers and plugins known to Hydra. Safe to call twice."""
    ConfigStore.instance().store(name="schema_svl", node=Svl)
    OmegaConf.register_new_resolver("svl", lambda part: str(PACKAGE / part), replace=True)
    OmegaConf.register_new_resolver("plugin", plugins.plugin_folder, replace=True)
    OmegaConf.register_new_resolver("accelerators", _accelerators, replace=True)
    Plugins.instance().register(PluginSearchPath)


class PluginSearchPath(SearchPathPlugin):
    """The `conf` folders of plugins, for Hydra."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append them: a plugin adds choices, it replaces none of svl's."""
        for plugin in plugins.find_plugins():
            if plugin.conf:
                search_path.append(provider=f"svl plugin {plugin.name}", path=f"file://{plugin.conf}")


def _accelerators() -> int:
    """How many jobs a machine can run at once: one for each accelerator; without any, one."""
    from torch import accelerator  # few configurations need it

    return max(1, accelerator.device_count())


def plain_values(node: DictConfig) -> dict[str, Any]:
    """A configuration node as plain data, for records."""
    return typing.cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))


def load_options(model: DictConfig, revision: str | None = None) -> LoadOptions:
    """What `model` says about how its checkpoint is loaded; `revision`: the commit, where it is known.

    Raises:
        SvlError: on a dtype or a protection that there is not.
    """
    protect = tuple(model.protect) if OmegaConf.is_list(model.protect) else model.protect
    return LoadOptions(
        dtype=model.dtype,
        device=model.device,
        device_map=resolved_setting(model, "device_map"),
        max_memory=resolved_setting(model, "max_memory"),
        attn_implementation=model.attn_implementation,
        revision=revision or model.revision,
        layers=model.layers,
        image_token=model.image_token,
        protect=protect,
        name=model.name or Path(model.path).name,
        trust_remote_code=model.trust_remote_code,
    )


def round_ratio(cfg: DictConfig) -> DictConfig:
    """A copy of the configuration whose ratio has RATIO_DIGITS digits: range(0.1,0.4,0.1) gives 0.30000000000000004."""
    rounded = cfg.copy()
    rounded.ratio = round(cfg.ratio, RATIO_DIGITS)
    return rounded


def asked_removals(cfg: DictConfig, n_layers: int) -> int:
    """How many of so many layers the configuration asks to remove: `n_remove`, or the ratio of them.

    Raises:
        SvlError: if the ratio is out of range.
    """
    return int(layers_to_remove(cfg.ratio, n_layers) if cfg.n_remove is None else cfg.n_remove)


def check_first(cfg: DictConfig) -> None:
    """What a beginner gets wrong, checked before torch is imported, which takes seconds.

    Raises:
        SvlError: on a setting that there is not, a ratio or number of layers out of range, or a setting without value.
    """
    check_known(cfg)
    if 2 <= cfg.ratio < 100:
        meant = f"{cfg.ratio:g} % is ratio={cfg.ratio / 100:g}"
        raise SvlError(f"ratio is {cfg.ratio:g}, but must lie in [0, 1): it is a fraction of the layers; {meant}")
    layers_to_remove(cfg.ratio, 1)
    if cfg.n_remove is not None and cfg.n_remove < 0:
        raise SvlError(f"n_remove is {cfg.n_remove}, but must be at least 0")
    for group in ("model", "calibration", "benchmark"):
        for key in sorted(OmegaConf.missing_keys(cfg[group])):
            raise SvlError(f"{key} is not set: add {key}=...")


def validate_config(cfg: DictConfig) -> dict[str, Any]:
    """Check everything that can be checked without loading the model; the method objects by group.

    Raises:
        SvlError: the first mistake, as one line.
        OmegaConfBaseException: if a value refers to something that is not there.
    """
    check_first(cfg)
    for name in cfg:
        if name != HYDRA:
            resolved_setting(cfg, name)  # what refers to nothing is found now, not when it is first used
    _check_mappings(cfg)
    check_numbers(cfg)
    load_options(cfg.model)
    if cfg.model.offload and cfg.model.device_map is not None:
        raise SvlError("model.offload leaves layers on disk, model.device_map places them: set one of the two")
    if cfg.efficiency.repeats and cfg.model.offload:
        raise SvlError("efficiency cannot be measured with model.offload, which leaves layers on disk")
    one_of("evaluator.name", cfg.evaluator.name, ("transformers", "vllm"))
    if cfg.benchmark.likelihood and cfg.evaluator.name != "transformers":
        raise SvlError("benchmark.likelihood=true: only evaluator=transformers tells the likelihood of options")
    if cfg.benchmark.tasks:
        _check_evaluator(cfg.evaluator.name)
    methods = {group: build_method(cfg[group], group) for group in METHODS}
    if cfg.model.offload:
        _check_offloadable(methods["compensation"])
    if not methods["compensation"].foldable:
        _check_nothing_exports(cfg)
        if {"rescoring", "probe"} <= methods["strategy"].needs:
            raise SvlError(f"{NO_TRIALS}: {choices_with('compensation', 'foldable')}")
    if not methods["recovery"].does_nothing:
        _check_recovery(cfg)
    return methods


def _check_offloadable(compensation: Compensation) -> None:
    """Raise SvlError if a compensation cannot be fitted, or is of no use, with `model.offload`."""
    name = type(compensation).__name__
    if compensation.in_memory:
        raise SvlError(
            f"model.offload leaves the model on disk, but {name} needs it whole in memory; set model.offload=false, or "
            "choose another compensation"
        )
    if not compensation.foldable:
        raise SvlError(
            f"model.offload leaves the model on disk, where nothing but an export can use what is fitted, but {name} "
            "gives maps at cuts, which no checkpoint can express; set model.offload=false, or choose another one"
        )


def _check_recovery(cfg: DictConfig) -> None:
    """Raise SvlError if the model cannot be trained as it is to be loaded, or the data are not described well."""
    training_data(cfg.recovery)
    if cfg.model.offload:
        raise SvlError("recovery trains a model in memory, but model.offload leaves layers on disk: set recovery=none")
    if cfg.model.dtype == "float16":
        raise SvlError("recovery trains in float32 or bfloat16, not in float16: set model.dtype=bfloat16")


def training_data(recovery: DictConfig) -> DictConfig:
    """`recovery.data` with the types and defaults of the group `calibration`.

    Raises:
        SvlError: if it has an unknown setting, one without effect, or a value of wrong type.
    """
    given = OmegaConf.to_container(recovery, resolve=True).get("data") or {}  # type: ignore[union-attr]
    check_known(DictConfig(given), TrainingData, "recovery.data.")
    for name in given:
        if name in NOT_OF_TRAINING:
            raise SvlError(f"recovery.data.{name} has no effect: {NOT_OF_TRAINING[name]}")
    try:
        found = typing.cast(DictConfig, OmegaConf.merge(OmegaConf.structured(TrainingData), given))
    except OmegaConfBaseException as error:
        where = f"setting 'recovery.data.{error.full_key}'"
        raise SvlError(f"recovery: {str(error).splitlines()[0]} ({where})") from error
    if found.path is None and (idle := [name for name in given if name != "path"]):
        raise SvlError(
            f"recovery.data.{idle[0]} has no effect: without recovery.data.path, recovery trains on the calibration set"
        )
    _check_columns(found, "recovery.data")
    check_least(found, {"samples": 1, "frames": 1, "seed": 0}, "recovery.data.")
    return found


def _check_nothing_exports(cfg: DictConfig) -> None:
    """Raise SvlError if a checkpoint is asked for that could not hold what the compensation does."""
    uses = {"export.path": cfg.export.path, "evaluator=vllm": cfg.evaluator.name == "vllm" and cfg.benchmark.tasks}
    for setting, asked in uses.items():
        if asked:
            raise SvlError(
                f"{setting} asks for a checkpoint, but {cfg.compensation['_target_']} gives maps: {NO_STOCK_FORM}: "
                f"{choices_with('compensation', 'foldable')}"
            )


def _check_mappings(cfg: DictConfig) -> None:
    """Raise SvlError if what must be a mapping is none, or has a name that nothing reads."""
    for name in ("model.image_processor", "evaluator.options"):
        _check_mapping(name, OmegaConf.select(cfg, name))
    _check_columns(cfg.calibration, "calibration")
    if OmegaConf.is_dict(cfg.recovery) and isinstance(file := OmegaConf.select(cfg, "recovery.data"), str):
        raise SvlError(f"recovery.data is '{file}', but must be a mapping: set recovery.data.path={file}")


def _check_columns(samples: DictConfig, group: str) -> None:
    """Raise SvlError if what settings of samples say of columns cannot be."""
    for name in ("image_table", "columns"):
        _check_mapping(f"{group}.{name}", samples[name])
    for name in samples.image_table:
        one_of(f"a name in {group}.image_table", name, ("name", "column"))


def _check_mapping(name: str, value: Any) -> None:
    if not OmegaConf.is_dict(value):
        raise SvlError(f"{name} is '{value}', but must be a mapping such as {{name: value}}")


def resolved_setting(cfg: DictConfig, name: Any) -> Any:
    """A setting, or all of a group."""
    value = cfg[name]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _check_evaluator(name: str) -> None:
    """Raise SvlError if what answers the questions is not installed, or cannot work here."""
    if name == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise SvlError("evaluator=vllm needs vLLM (pip install vllm) and a GPU that it supports")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise SvlError("evaluator=vllm starts processes itself: run it without torchrun, see evaluator.options")
    if importlib.util.find_spec("lmms_eval") is None:
        raise SvlError("benchmarks need lmms-eval: pip install 'svl[eval]', or run with benchmark=none")
