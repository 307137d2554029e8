"""Configuration: what Hydra is told, what is checked, and the one place that builds objects from it.

Method groups (selector, strategy, compensation, recovery, quantization, visual_tokens, tracker) are frozen dataclasses
named by `_target_`; the dataclass is the schema: any of its fields can be set, and nothing else. The other groups are
plain values with the schemas of svl.config_schema.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from svl import plugins
from svl.config_ranges import HYDRA, check_known, check_least, check_numbers, type_hints
from svl.config_schema import Svl, TrainingData
from svl.core import (
    Compensation,
    Method,
    Strategy,
    SvlError,
    TokenSelector,
    check_stepwise,
    did_you_mean,
    layers_to_remove,
    one_of,
)
from svl.core.patch import NO_STOCK_FORM, NO_TRIALS
from svl.models.options import LoadOptions
from svl.quantization.base import Quantization
from svl.recovery.base import Recovery
from svl.trackers.record import Tracker
from svl.visual_tokens.base import VisualTokens

PACKAGE, CONF = plugins.PACKAGE, plugins.CONF  # svl's folder, and that of its configuration

# Groups of methods, and what their classes derive from.
METHODS: dict[str, type[Method]] = {
    "selector": TokenSelector,
    "strategy": Strategy,
    "compensation": Compensation,
    "recovery": Recovery,
    "quantization": Quantization,
    "visual_tokens": VisualTokens,
    "tracker": Tracker,
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


def build_method(node: DictConfig, group: str, where: str | None = None) -> Any:
    """The object that a method group describes: its `_target_` dataclass with the node's other keys as fields.

    Targets must lie in `svl.` or in a plugin (see svl.plugins). A field that is a method itself is built in the same
    way. `where` is what the node is called in messages; its group by default.

    Raises:
        SvlError: on a target that does not exist, is not allowed or is no method of this group, an unknown key, or a
            value of wrong type or range.
    """
    where = where or group
    if not OmegaConf.is_config(node):
        hint = "" if where == group else f": choose one with {group}@{where}=NAME"
        raise SvlError(f"{where} is {node!r}, but must be a group of settings{hint}")
    values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    if not isinstance(values, dict) or "_target_" not in values:
        raise SvlError(f"{where} has no _target_: name the dataclass that implements it")
    cls = _find_class(str(values.pop("_target_")), group, where)
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in map(str, values):
        if key not in known:
            listing = ", ".join(known) or "none"
            raise SvlError(f"{where} has no setting '{key}'{did_you_mean(key, known)}; it has: {listing}")
    kinds = _method_fields(cls).items()
    inner = {name: _build_inner(node[name], *kind, f"{where}.{name}") for name, kind in kinds if name in values}
    values = {name: value for name, value in values.items() if name not in inner}
    if "rescoring" in cls.needs:
        _check_stepwise(inner, where)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(_schema(cls)), values)
        plain = OmegaConf.to_container(typed, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise SvlError(f"{where}: {str(error).splitlines()[0]} (setting '{error.full_key}')") from error
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in typing.cast(dict, plain).items()}, **inner)


def _check_stepwise(inner: Mapping[str, Any], where: str) -> None:
    """Raise SvlError if a strategy that goes layer after layer is to ask one that cannot be asked so."""
    for name, method in inner.items():
        if isinstance(method, Strategy):
            try:
                check_stepwise(f"{where}.{name}", method)
            except SvlError as error:
                raise SvlError(f"{error}; choose one of: {choices_with('strategy', 'stepwise')}") from None


def choices_with(group: str, flag: str) -> str:
    """The choices of a method group but none, plugins' too, whose classes say that `flag` is true; for messages."""
    found = set()
    for file in (file for folder in plugins.conf_folders() for file in (folder / group).glob("*.yaml")):
        with contextlib.suppress(SvlError, OmegaConfBaseException, yaml.YAMLError):  # another one's mistake
            content: Any = OmegaConf.load(file)
            if not OmegaConf.is_dict(content):
                continue
            if getattr(_find_class(str(content.get("_target_")), group, file.stem), flag):
                found.add(file.stem)
    return ", ".join(sorted(found - {"none"}))


def _build_inner(node: Any, group: str, by_name: bool, where: str) -> Any:
    """The method that a field describes, or its methods by name."""
    if not by_name:
        return build_method(node, group, where)
    if not OmegaConf.is_dict(node):
        raise SvlError(f"{where} is {node!r}, but must be a mapping of names to settings of a {group}")
    return {str(name): build_method(node[name], group, f"{where}.{name}") for name in node}


def _method_fields(cls: type) -> dict[str, tuple[str, bool]]:
    """The fields of a method that hold methods themselves -> their group, and whether they are several by name."""
    groups = {kind: group for group, kind in METHODS.items()}
    hints, found = type_hints(cls), {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        by_name = typing.get_origin(hint) is Mapping
        kind = typing.get_args(hint)[1] if by_name else hint
        if field.init and kind in groups:
            found[field.name] = (groups[kind], by_name)
    return found


def _find_class(target: str, group: str, where: str) -> type[Method]:
    """The class that `target` names.

    Raises:
        SvlError: if it is not allowed or does not exist, or cannot be a method of this group.
    """
    if not target.startswith("svl.") and not any(target.startswith(f"{p.name}.") for p in plugins.find_plugins()):
        listing = ", ".join(["svl", *(plugin.name for plugin in plugins.find_plugins())])
        raise SvlError(f"{where}._target_ '{target}' is outside {listing}; allow its package in {plugins.VARIABLE}")
    module, _, name = target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SvlError(f"{where}._target_ '{target}' cannot be imported: {error}") from error
    who, base = f"{where}._target_ '{target}'", METHODS[group]
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise SvlError(f"{who} is no dataclass")
    if not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise SvlError(f"{who} is no frozen dataclass: write @dataclass(frozen=True)")
    if not issubclass(cls, base):
        raise SvlError(f"{who} does not derive from {base.__module__}.{base.__name__}")
    if inspect.isabstract(cls):
        raise SvlError(f"{who} does not implement {', '.join(sorted(getattr(cls, '__abstractmethods__', ())))}")
    if unknown := sorted(set(cls.needs) - cls.known_needs):
        listing = ", ".join(sorted(cls.known_needs)) or "nothing"
        raise SvlError(f"{who} needs {', '.join(unknown)}, but a {group} may only need: {listing}")
    return cls


def _schema(cls: type) -> type:
    """A mutable twin of a frozen dataclass, with tuples as lists and without methods: what OmegaConf can type-check."""
    hints, inner = type_hints(cls), _method_fields(cls)
    fields: list[Any] = []
    for f in dataclasses.fields(cls):
        if not f.init or f.name in inner:
            continue
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
        SvlError: if it has an unknown setting, or a value of wrong type.
    """
    given = OmegaConf.to_container(recovery, resolve=True).get("data") or {}  # type: ignore[union-attr]
    if not isinstance(given, dict):
        raise SvlError(f"recovery.data is '{given}', but must be a mapping such as {{path: FILE}}")
    check_known(DictConfig(given), TrainingData, "recovery.data.")
    try:
        found = typing.cast(DictConfig, OmegaConf.merge(OmegaConf.structured(TrainingData), given))
    except OmegaConfBaseException as error:
        where = f"setting 'recovery.data.{error.full_key}'"
        raise SvlError(f"recovery: {str(error).splitlines()[0]} ({where})") from error
    if found.path is None and (idle := [name for name in given if name != "path"]):
        raise SvlError(
            f"recovery.data.{idle[0]} has no effect: without recovery.data.path, recovery trains on the calibration set"
        )
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
    for name in ("model.image_processor", "calibration.image_table", "calibration.columns", "evaluator.options"):
        if not OmegaConf.is_dict(value := OmegaConf.select(cfg, name)):
            raise SvlError(f"{name} is '{value}', but must be a mapping such as {{name: value}}")
    for name in cfg.calibration.image_table:
        one_of("a name in calibration.image_table", name, ("name", "column"))


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
