"""What people are told: errors in one line, and messages that carry neither secrets nor escape sequences."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from svl import config, plugins
from svl.core.errors import SvlError, did_you_mean, is_out_of_memory, reason_of, similar
from svl.run import hydra_internals
from svl.store.files import cannot_write
from svl.text.escaping import for_terminal
from svl.text.redaction import redact_text

NEAR = 5  # choices that are shown where something like them was asked for


class SafeFormatter(logging.Formatter):
    """Log lines without secrets and without anything that a terminal would obey."""

    def format(self, record: logging.LogRecord) -> str:
        return safe_line(super().format(record))


def safe_line(text: str) -> str:
    """Text for terminal and logs."""
    return for_terminal(redact_text(text))


def one_line(error: BaseException) -> str | None:
    """The line to show for an error that a person can mend; None for a bug."""
    if isinstance(error, OverrideParseException):
        return explain_grammar(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = error.__cause__ or error.__context__
        if isinstance(cause, SvlError):
            return str(cause)
        return explain_composition(cause if isinstance(cause, OmegaConfBaseException) else error, error)
    if isinstance(error, SvlError):
        return str(error)
    if is_out_of_memory(error):
        sizes = "calibration.batch_size and benchmark.batch_size"
        return f"out of memory: lower {sizes}, or set model.dtype=bfloat16 or model.device=cpu"
    if isinstance(error, MarkedYAMLError):
        place = f" in '{mark.name}', line {mark.line + 1}" if (mark := error.problem_mark) else ""
        return f"the configuration is no YAML{place}: {error.problem}"
    if hydra_internals.is_of_composing(error):
        return f"the configuration cannot be composed: {reason_of(error)}"
    return cannot_write(error)


def explain_grammar(error: OverrideParseException) -> str:
    """One line for a word of the command line that Hydra cannot read."""
    if "missing EQUAL" in error.message:
        return f"'{error.override}' is no setting: settings are NAME=VALUE, without spaces around the sign"
    quoted = """a value with any of =,()[]{}'" in it stands in quotes of its own: 'NAME="VALUE"' in a shell"""
    closed = "what opens a bracket or a quote closes it, nothing ends in a comma"
    return f"cannot read '{error.override}': {closed}, and {quoted}"


def explain_composition(error: BaseException, outer: BaseException) -> str:
    """One line for a composition error, with what was probably meant."""
    text = f"{outer}\n{error}"
    if found := re.search(r"Could not find '((?:hydra/)?[^/']+)/(.*)'$", text, re.MULTILINE):
        _, _, listed = text.partition("Available options in '")  # those of Hydra's plugins are in no folder
        return explain_choice(found[1], found[2], re.findall(r"^\t(\S+)$", listed, re.MULTILINE))
    if found := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{found.group(1)} names several values: add -m to run all of them, or brackets to make it a list"
    if re.search(r"object_type=(Range|Choice|Glob|Interval)", text):  # Hydra trips over its own dataclass
        return "range(...), choice(...) and glob(...) stand alone: they cannot be parts of a list of values"
    path = re.search(r"full_key: (\S+)", text)
    if found := re.search(r"Key '([^']+)' (?:is )?not in |Could not override '([^']+)'", text):
        key = path.group(1) if path else found.group(1) or found.group(2)
        if key == "experiment":
            return "a file of conf/experiment must begin with the line '# @package _global_', and hold settings"
        group, at, place = key.partition("@")
        if at and group in config_groups():  # a choice that no defaults list puts there
            return f"there is no '{place}' yet that a {group} could replace: write +{key}=NAME"
        known = neighbouring_settings(key)
        listing = f"; known here: {', '.join(known)}" if known else ""
        return f"there is no setting '{key}'{did_you_mean(key, known)}{listing}"
    line = next(line for line in str(error).splitlines() if line.strip())
    return f"{path.group(1)}: {line}" if path else line


def explain_choice(group: str, choice: str, listed: Sequence[str] = ()) -> str:
    """The line for a choice that a group does not have: those of a similar name, else all. `listed` exist, too."""
    files = {file.stem for folder in config_folders() for file in (folder / group).glob("*.yaml")}
    choices = sorted(files.union(listed))
    missing = f"there is no {group} '{choice}'"
    if "/" in choice or Path(choice).suffix[1:].isalpha() or (choice and Path(choice).exists()):
        return f"{missing}: {explain_path(group, choice, has_own='local' in choices)}"
    near = similar(choice, choices, cutoff=0.5)[:NEAR]
    if not near or len(choices) <= NEAR or "/" in group:  # svl list has no groups of Hydra's
        listing = f"choices: {', '.join(choices)}"
    else:
        listing = f"similar: {', '.join(near)}; svl list {group} shows all {len(choices)}"
    return f"{missing}{did_you_mean(choice, choices)}; {listing}"


def explain_path(group: str, path: str, has_own: bool) -> str:
    """What to write for a path that was given as the choice of a group, which `has_own` files by their path or not."""
    if not has_own:
        return f"choices are names, which svl list {group} shows; --config-dir DIR adds those of DIR/{group}/NAME.yaml"
    words = [word.partition("=")[0] for word in sys.argv[1:] if path in word.partition("=")[2]]
    name = next((word for word in words if re.fullmatch(rf"\+?{group}(@.+)?", word)), group)
    return f"choices are names; for a path, write {name}=local {name.lstrip('+').rpartition('@')[2]}.path={path}"


def config_groups() -> set[str]:
    """Names of what settings are chosen for."""
    return {file.parent.name for folder in config_folders() for file in folder.glob("*/*.yaml")}


def config_folders() -> list[Path]:
    """Folders that configuration is composed from."""
    own = hydra_internals.command_line_config_folder()
    return [plugins.CONF, *([own] if own else []), *plugins.conf_folders()[1:]]


def compose(words: Sequence[str]) -> DictConfig:
    """The configuration of these overrides, from the folders that the command line names."""
    where = f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in config_folders()[1:])}]"
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        return hydra.compose("config", overrides=[where, *words])


def neighbouring_settings(key: str) -> list[str]:
    """The settings next to `key` in the composed configuration of this command line without its wrong part."""
    groups = "model|strategy|selector|compensation|recovery|quantization|visual_tokens|benchmark"
    choices = [word for word in sys.argv[1:] if re.fullmatch(rf"({groups})=\w+", word)]
    try:
        cfg = compose(choices)
    except (HydraException, OmegaConfBaseException):  # the wrong part is in the chosen file itself
        cfg = OmegaConf.structured(config.Svl)
    parent, _, _ = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if not isinstance(node, DictConfig):
        return []
    return [f"{parent}.{name!s}" if parent else str(name) for name in node if name != "_target_"]
