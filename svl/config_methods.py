"""Method objects from configuration: a group's `_target_` names a frozen dataclass, which is the schema of the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import typing
from collections.abc import Mapping
from typing import Any

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from svl import plugins
from svl.config_ranges import type_hints
from svl.core import Compensation, Method, Strategy, SvlError, TokenSelector, check_stepwise, did_you_mean
from svl.quantization.base import Quantization
from svl.recovery.base import Recovery
from svl.trackers.record import Tracker
from svl.visual_tokens.base import VisualTokens

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
    _check_mappings(cls, values, where)
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


def _check_mappings(cls: type, values: Mapping[Any, Any], where: str) -> None:
    """Raise SvlError if a value is no mapping where its field is one."""
    for name, hint in type_hints(cls).items():
        if typing.get_origin(hint) is dict and not isinstance(values.get(name, {}), Mapping):
            raise SvlError(f"{where}.{name} is {values[name]!r}, but must be a mapping: set {where}.{name}.NAME=VALUE")


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
