"""The catalog as text for a terminal: help, lists, and what there is to say of a group or a choice."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from svl.catalog import choices, sources
from svl.catalog.choices import Choice, Group
from svl.catalog.sources import Field
from svl.plugins import CONF, PACKAGE

WIDEST = 120
FIRST = ("model", "calibration", "selector", "strategy", "compensation", "benchmark")  # groups, in the order of a run
ABOUT = """\
svl removes decoder layers of vision-language models without training, scores what is left, and exports it.

  svl [NAME=VALUE ...]           one run: calibrate, choose layers, fill the gap, score; everything finished is kept
  svl -m [NAME=A,B ...]          a sweep over all combinations; what its runs share is computed once
  svl doctor [NAME=VALUE ...]    what of such a run will work, found out before anything heavy
  svl list [GROUP]               the choices of a group, with sources
  svl explain GROUP[=CHOICE]     what it does, its settings with defaults, paper and cost
  svl-report, svl-export         tables and figures from finished runs; checkpoints from plans

Examples
  svl strategy=shortgpt ratio=0.25
  svl -m strategy=short_lvlm,shortgpt ratio=0.125,0.25
  svl model=local model.path=DIR calibration=local calibration.path=FILE benchmark=none export.path=pruned
"""
OPTIONS = """\
Options
  -m                             a sweep
  --cfg job                      print the whole configuration and end; --cfg job --package strategy: a part of it
  --config-dir DIR               a folder with choices of your own
  --shell-completion install=bash  print the code that completes names; for ~/.bashrc: eval "$(svl --shell-completion \
install=bash)"
  --version, --hydra-help        the version; options of Hydra, which reads the settings
"""


def help_page() -> str:
    """What `svl --help` prints."""
    groups = ordered_groups()
    rows = [(group.name, f"{group.says} ({count_choices(group)})") for group in groups]
    settings = [(field.name, f"{field.comment} (default {field.default})") for field in choices.root_settings()]
    settings.append(("export.path", f"{choices.group_settings('export')[0].comment}"))
    return "\n".join(
        [
            ABOUT,
            "Groups (GROUP=CHOICE; svl list GROUP)",
            *columns(rows),
            "",
            "Settings besides those of groups",
            *columns(settings),
            "",
            OPTIONS.rstrip(),
        ]
    )


def ordered_groups() -> list[Group]:
    """All groups, those that describe a run first."""
    groups = {group.name: group for group in choices.groups()}
    return [groups.pop(name) for name in FIRST] + list(groups.values())


def count_choices(group: Group) -> str:
    """How many choices a group has, and which is the default."""
    n = len(choices.choices(group.name))
    default = "" if group.default == "null" else f", default {group.default}"
    return f"{n} choice{'s' if n > 1 else ''}{default}"


def groups_page() -> str:
    """What `svl list` prints."""
    rows = [(group.name, f"{group.says} ({count_choices(group)})") for group in ordered_groups()]
    return "\n".join([*columns(rows), "", "svl list GROUP: its choices"])


def list_page(group: Group, folders: Sequence[Path]) -> str:
    """The choices of a group, with a line about each and its source."""
    found = choices.choices(group.name, folders)
    rows = [(choice.name, f"{choice.summary}{source_note(choice)}") for choice in found]
    lines = [f"{group.name}: {group.says}", *columns(rows), ""]
    return "\n".join([*lines, f"svl explain {group.name}=NAME: settings, source and more"])


def source_note(choice: Choice) -> str:
    """ " [owner/name]": where a choice comes from, unless its summary has said so."""
    source = "" if choice.target else choice.source
    return f" [{source}]" if source else ""


def choice_page(choice: Choice) -> str:
    """All that there is to say of one choice."""
    parts = [f"{choice.group}={choice.name}", *_about(choice)]
    settings = choice.settings()
    if settings:
        what = "Settings" if choice.target else "What it sets"
        parts.append("\n".join([f"{what} ({choice.group}.NAME=VALUE)", *fields_table(settings)]))
    parts.append("\n".join(_facts(choice)))
    return "\n\n".join(parts)


def _about(choice: Choice) -> Iterator[str]:
    """The header of the file, and the docstring of the module that implements it."""
    if choice.header:
        yield choice.header.strip()
    text = sources.without_cost(choice.docstring)
    if text:
        yield text


def _facts(choice: Choice) -> Iterator[str]:
    """What comes with it, papers, cost, files."""
    facts: list[tuple[str, str]] = []
    if choice.brings:
        words = " ".join(f"{group}={name}" for group, name in choice.brings.items())
        facts.append(("Brings", f"{words} (unless another is named)"))
    label = "Paper" if choice.target else "Source"
    facts.append((label, ", ".join(choice.papers) if choice.target else choice.source))
    if choice.cost:
        facts.append(("Cost", choice.cost))
    for group, name in choice.brings.items():
        if cost := choices.find_choice(group, name).cost:
            facts.append(("", f"{group}={name}: {cost}"))
    if choice.target:
        facts.append(("Code", shown_path(sources.module_file(choice.target.rpartition(".")[0]))))
    facts.append(("Defaults", shown_path(choice.file)))
    yield from columns([(name, text) for name, text in facts if text], indent="")


def group_page(group: Group, folders: Sequence[Path]) -> str:
    """What a group decides, its settings, and its choices."""
    parts = [f"{group.name}: {group.says}"]
    if settings := choices.group_settings(group.name):
        parts.append("\n".join([f"Settings ({group.name}.NAME=VALUE)", *fields_table(settings)]))
    else:
        parts.append(f"Every choice has settings of its own: svl explain {group.name}=NAME")
    names = ", ".join(choice.name for choice in choices.choices(group.name, folders))
    parts.append("\n".join(columns([("Choices", names), ("Default", group.default)], indent="")))
    return "\n\n".join(parts)


def setting_page(name: str, field: Field) -> str:
    """What there is to say of one setting."""
    default = "must be given" if field.default is None else f"default {field.default}"
    return "\n".join([f"{name} ({field.type}; {default})", *wrapped(field.comment, "  ")])


def fields_table(fields: Sequence[Field]) -> list[str]:
    """Settings with type, default and meaning, in columns."""
    heads = [f"{field.name}: {field.type} = {'???' if field.default is None else field.default}" for field in fields]
    return columns(list(zip(heads, (field.comment for field in fields), strict=True)))


def columns(rows: Sequence[tuple[str, str]], indent: str = "  ") -> list[str]:
    """Names and texts in two columns, as wide as the terminal; a name that is too long has a line to itself."""
    width = min(max((len(name) for name, _ in rows), default=0), 34) + 2
    lines = []
    for name, text in rows:
        first, *rest = wrapped(text, "", width + len(indent)) or [""]
        if len(name) > width - 2 and text:
            lines.append(f"{indent}{name}")
            name = ""
        lines.append(f"{indent}{name:<{width}}{first}".rstrip())
        lines += [f"{indent}{'':<{width}}{line}" for line in rest]
    return lines


def wrapped(text: str, indent: str, taken: int = 0) -> list[str]:
    """A text in lines that fit the terminal beside `taken` letters."""
    width = min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST) - taken
    lines = textwrap.wrap(text, max(width, 40), break_long_words=False, break_on_hyphens=False)
    return [f"{indent}{line}" for line in lines]


def shown_path(file: Path) -> str:
    """A file of svl as in its repository, another one as it is."""
    for root, name in ((CONF, "conf"), (PACKAGE, "svl")):
        if file.is_relative_to(root):
            return f"{name}/{file.relative_to(root).as_posix()}"
    return str(file)
