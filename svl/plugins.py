"""Packages of methods besides svl's own.

They are found by two ways:

* entry points of the group `svl.plugins`, for installed packages; each names one package,
* the environment variable SVL_PLUGINS, a comma-separated list of module names and of paths to folders. A path is all
  there is to set: the folder becomes importable under its name.

Targets of methods may lie in these packages, and a `conf` folder in one of them joins Hydra's search path, behind
svl's own. In YAML, `${plugin:NAME}` is the folder of a package (for a benchmark's tasks, say).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path

from svl.core import SvlError
from svl.core.errors import explained

ENTRY_POINTS = "svl.plugins"
VARIABLE = "SVL_PLUGINS"
PACKAGE = Path(__file__).parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"  # installed, or a checkout


@dataclass(frozen=True)
class Plugin:
    """A package of methods: its name, and its folder (None: a single module, or not found)."""

    name: str
    folder: Path | None

    @property
    def conf(self) -> Path | None:
        """Its configuration files, if it has any."""
        return self.folder / "conf" if self.folder and (self.folder / "conf").is_dir() else None


def find_plugins() -> list[Plugin]:
    """All plugins, those of SVL_PLUGINS first. Folders named there become importable.

    Raises:
        SvlError: if such a folder does not exist, or its name cannot be imported.
    """
    entries = [entry.strip() for entry in os.environ.get(VARIABLE, "").split(",")]
    plugins = [_plugin_of_folder(entry) if _is_path(entry) else _plugin_of_module(entry) for entry in entries if entry]
    plugins += map(_plugin_of_module, _installed(tuple(sys.path)))
    return list({plugin.name: plugin for plugin in reversed(plugins)}.values())[::-1]


def conf_folders() -> list[Path]:
    """Where the configuration's files are: svl's own folder, then those of plugins."""
    return [CONF, *(plugin.conf for plugin in find_plugins() if plugin.conf)]


def import_plugins() -> None:
    """Import every plugin that can be found: a model family of its own registers with transformers in this way.

    Raises:
        SvlError: if importing one fails.
    """
    for plugin in find_plugins():
        if _find_spec(plugin.name) is not None:
            with explained(f"the plugin '{plugin.name}' cannot be imported"):
                importlib.import_module(plugin.name)


def plugin_folder(name: str) -> str:
    """The folder of the plugin `name`, as text.

    Raises:
        SvlError: if there is no such plugin.
    """
    plugins = find_plugins()
    for plugin in plugins:
        if plugin.name == name and plugin.folder:
            return str(plugin.folder)
    known = ", ".join(plugin.name for plugin in plugins) or "none"
    raise SvlError(f"there is no folder of a plugin '{name}'; plugins are: {known} (see {VARIABLE})")


@cache
def _installed(path: tuple[str, ...]) -> tuple[str, ...]:
    """The modules that entry points name. Kept for each `sys.path`: the metadata of every package is read for it."""
    return tuple(point.value.partition(":")[0] for point in importlib.metadata.entry_points(group=ENTRY_POINTS))


def _is_path(entry: str) -> bool:
    return os.sep in entry or entry.startswith((".", "~"))


def _plugin_of_folder(entry: str) -> Plugin:
    folder = Path(entry).expanduser().absolute().resolve()
    if not folder.is_dir():
        raise SvlError(f"{VARIABLE}: there is no folder '{entry}'")
    if not folder.name.isidentifier():
        raise SvlError(f"{VARIABLE}: '{folder.name}' cannot be imported: name the folder like a Python module")
    parent = str(folder.parent)
    if parent not in sys.path:
        sys.path.append(parent)
    plugin = _plugin_of_module(folder.name)
    if plugin.folder != folder:
        raise SvlError(f"{VARIABLE}: a module called '{folder.name}' is installed already: give '{entry}' another name")
    return plugin


def _find_spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):  # one of its parents is missing: said where a method of it is asked for
        return None


def _plugin_of_module(name: str) -> Plugin:
    spec = _find_spec(name)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return Plugin(name, Path(folders[0]).resolve() if folders else None)
