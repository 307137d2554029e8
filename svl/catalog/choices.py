"""The groups of the configuration, their choices and settings, read from the YAML files of svl and of plugins."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from svl.catalog import sources
from svl.catalog.sources import Field
from svl.core import SvlError, did_you_mean
from svl.evaluation import benchmarks
from svl.plugins import CONF, conf_folders

SCHEMA = "svl.config_schema"
ROOT = f"{SCHEMA}.Svl"
_COMMENT = re.compile(r"""^(?:[^#'"]|'[^']*'|"[^"]*")*?\s#\s(.*)$""")  # behind a value; not a # in quotes


@dataclass(frozen=True)
class Group:
    """A group: its name, what it decides, and the choice that it has by default."""

    name: str
    says: str
    default: str


@dataclass(frozen=True)
class Choice:
    """One YAML file of a group.

    Attributes:
        group: the group's name.
        file: the YAML file.
    """

    group: str
    file: Path

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        return self.file.stem

    @cached_property
    def text(self) -> str:
        """The file."""
        return self.file.read_text(encoding="utf-8")

    @cached_property
    def content(self) -> Mapping[str, Any]:
        """The file, parsed.

        Raises:
            SvlError: if it is no mapping in YAML.
        """
        try:
            content = yaml.safe_load(self.text) or {}
        except yaml.YAMLError as error:
            raise SvlError(f"'{self.file}' is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise SvlError(f"'{self.file}' holds no settings")
        return content

    @property
    def target(self) -> str | None:
        """The class that implements it, of a method."""
        return self.content.get("_target_")

    @property
    def docstring(self) -> str:
        """Of the module that implements it; empty if there is none."""
        return sources.module_text(self.target.rpartition(".")[0]) if self.target else ""

    @property
    def header(self) -> str:
        """The comment at the top of its file."""
        lines = re.match(r"(?:#.*\n)*", self.text)[0].splitlines()  # type: ignore[index]
        return "\n".join(line[1:].removeprefix(" ") for line in lines if not line.startswith("# @package"))

    @property
    def summary(self) -> str:
        """What it is, in one line: the header of its file, or the first line of its module."""
        header = re.sub(r"^svl -m [^:]*: ", "", self.header)  # experiments begin with how to run them
        first = re.split(r"(?<=\.)\n", header)[0]
        return " ".join(first.split()).removesuffix(".") or sources.first_sentence(self.docstring)

    @property
    def brings(self) -> dict[str, str]:
        """Choices of other groups that come with it, unless others are named: group -> name."""
        found = {}
        for entry in self.content.get("defaults", []):
            for key, value in entry.items() if isinstance(entry, dict) else ():
                if named := re.fullmatch(r"(?:override )?/(\w+)(?:@_global_\.\w+)?", str(key)):
                    found[named[1]] = str(value)
        return found

    @property
    def inner(self) -> dict[str, str]:
        """Settings that are methods themselves: name -> "group=choice"."""
        found = {}
        for entry in self.content.get("defaults", []):
            for key, value in entry.items() if isinstance(entry, dict) else ():
                if named := re.fullmatch(r"/(\w+)@(\w+)", str(key)):
                    found[named[2]] = f"{named[1]}={value}"
        return found

    @property
    def source(self) -> str:
        """Where it is from: a repository of the hub, or papers; empty if it comes with svl."""
        if self.group in ("model", "calibration"):
            path = str(self.content.get("path", ""))
            return path if benchmarks.is_hub_name(path) and "$" not in path else ""
        if self.group == "benchmark":
            return ", ".join(_data_sets(self.content))
        return ", ".join(self.papers)

    @property
    def papers(self) -> list[str]:
        """Addresses of papers: those that the header names, else those of the docstring."""
        return sources.paper_links(self.header) or sources.paper_links(self.docstring)

    @property
    def cost(self) -> str:
        """What a method costs, as its docstring says."""
        return sources.cost_of(self.docstring)

    def settings(self) -> list[Field]:
        """Of a method, every setting, with this file's values and comments; of other groups, what the file sets."""
        given = {name: in_yaml(value) for name, value in self.content.items() if name not in ("_target_", "defaults")}
        given |= self.inner
        comments = yaml_comments(self.text)
        fields = {
            field.name: field for field in sources.class_fields(self.target or plain_groups().get(self.group) or ROOT)
        }
        names = fields if self.target else [name for name in given if name in fields]
        return [
            Field(
                name,
                fields[name].type,
                given.get(name) or as_yaml(fields[name].default),
                comments.get(name) or fields[name].comment,
            )
            for name in names
        ]


def groups() -> list[Group]:
    """The groups of the configuration, in the order of conf/config.yaml, whose comments say what each decides."""
    text = (CONF / "config.yaml").read_text(encoding="utf-8")
    found = re.findall(r"^  - (\w+): (\w+) +# (.*)$", text, re.MULTILINE)
    return [Group(name, says, default) for name, default, says in found]


@cache
def plain_groups() -> dict[str, str]:
    """The groups of plain values -> the dataclass of their settings."""
    known = sources.classes_in_sight(SCHEMA)
    fields = sources.class_fields(ROOT)
    return {f.name: known[f.type] for f in fields if f.type in known and known[f.type].startswith("svl.")}


def root_settings() -> list[Field]:
    """The settings that are in no group, with the values and comments of conf/config.yaml."""
    text = (CONF / "config.yaml").read_text(encoding="utf-8")
    content, comments = yaml.safe_load(text), yaml_comments(text)
    fields = [field for field in sources.class_fields(ROOT) if field.name in content]
    return [
        Field(field.name, field.type, in_yaml(content[field.name]), comments.get(field.name, field.comment))
        for field in fields
        if field.name not in plain_groups()
    ]


def group_settings(group: str) -> list[Field]:
    """The settings of a group of plain values; of groups of methods none, since each method has its own."""
    if group not in plain_groups():
        return []
    fields = sources.class_fields(plain_groups()[group])
    return [Field(field.name, field.type, as_yaml(field.default), field.comment) for field in fields]


def choices(group: str, folders: Sequence[Path] = ()) -> list[Choice]:
    """The choices of a group, by name; those of `folders` (--config-dir) and of plugins as well."""
    files: dict[str, Path] = {}
    for folder in (*folders, *conf_folders()):
        for file in sorted((folder / group).glob("*.yaml")):
            files.setdefault(file.stem, file)
    return [Choice(group, files[name]) for name in sorted(files)]


def find_choice(group: str, name: str, folders: Sequence[Path] = ()) -> Choice:
    """One choice of a group.

    Raises:
        SvlError: if there is none of that name.
    """
    known = {choice.name: choice for choice in choices(group, folders)}
    if name not in known:
        raise SvlError(f"there is no {group} '{name}'{did_you_mean(name, known)}; choices: {', '.join(known)}")
    return known[name]


def yaml_comments(text: str) -> dict[str, str]:
    """The comments behind the top-level settings of a YAML file, or behind the first line of their block."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if key := re.match(r"(\w+):", line):
            name = key[1]
        if name and name not in found and (comment := _COMMENT.match(line)):
            found[name] = comment[1].strip()
    return found


def in_yaml(value: Any) -> str:
    """A value as it is written on the command line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False)
    return text.removesuffix("...\n").strip()


def as_yaml(default: str | None) -> str | None:
    """A Python literal as it is written on the command line; other expressions stay as they are."""
    if default is None:
        return None
    try:
        value = ast.literal_eval(default)
    except ValueError:
        return default
    return in_yaml(list(value) if isinstance(value, tuple) else value)


def _data_sets(content: Mapping[str, Any]) -> Iterator[str]:
    """The data sets of the hub that the tasks of a benchmark read; their names are in lmms-eval's files."""
    if importlib.util.find_spec("lmms_eval") is None or content.get("include_path"):
        return
    paths = (benchmarks.task_settings(task, None).get("dataset_path") or "" for task in content.get("tasks") or ())
    yield from (path for path in dict.fromkeys(paths) if benchmarks.is_hub_name(path))
