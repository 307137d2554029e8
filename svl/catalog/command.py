"""`svl --help`, `svl --version`, `svl list`, `svl explain`: what can be said before anything is composed or loaded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import svl
from svl.catalog import choices, pages
from svl.catalog.choices import Group
from svl.catalog.sources import Field
from svl.core import SvlError, did_you_mean
from svl.text.escaping import for_terminal

PLURALS = {"strategies": "strategy", "quantizations": "quantization", "efficiencies": "efficiency"}


def show_help(words: Sequence[str]) -> None:
    """Print what `svl` does."""
    print_page(pages.help_page())


def show_version(words: Sequence[str]) -> None:
    """Print the version."""
    print(f"svl {svl.__version__}")


def show_list(words: Sequence[str]) -> None:
    """Print the choices of the groups that are named, or the groups."""
    names, folders = split_words(words)
    print_page("\n\n".join(pages.list_page(find_group(name), folders) for name in names) or pages.groups_page())


def show_explanation(words: Sequence[str]) -> None:
    """Print what there is to say of choices (strategy=laco), groups (model) or settings (model.dtype).

    Raises:
        SvlError: if there is no such thing, or nothing is asked about.
    """
    names, folders = split_words(words)
    if not names:
        raise SvlError("svl explain what? A choice (strategy=laco), a group (strategy) or a setting (model.dtype)")
    print_page("\n\n".join(explain_word(word, folders) for word in names))


def explain_word(word: str, folders: Sequence[Path]) -> str:
    """What there is to say of a choice, a group or a setting.

    Raises:
        SvlError: if there is no such thing.
    """
    group, equals, choice = word.partition("=")
    if equals:
        return pages.choice_page(choices.find_choice(find_group(group).name, choice, folders))
    roots = {field.name: field for field in choices.root_settings()}
    if word in roots:
        return pages.setting_page(word, roots[word])
    name, dot, setting = word.partition(".")
    if dot:
        return pages.setting_page(word, find_setting(name, setting))
    return pages.group_page(find_group(word), folders)


def find_group(name: str) -> Group:
    """A group by its name or the plural of it.

    Raises:
        SvlError: if there is none.
    """
    known = {group.name: group for group in pages.ordered_groups()}
    single = PLURALS.get(name, name)
    for form in (single, single.removesuffix("s")):
        if form in known:
            return known[form]
    raise SvlError(f"there is no group '{name}'{did_you_mean(name, known)}; groups: {', '.join(known)}")


def find_setting(group: str, name: str) -> Field:
    """A setting of a group of plain values.

    Raises:
        SvlError: if there is none; settings of methods are with the method.
    """
    fields = {field.name: field for field in choices.group_settings(group)}
    if name in fields:
        return fields[name]
    if not fields:
        raise SvlError(f"the settings of {find_group(group).name} are those of the choice: svl explain {group}=NAME")
    raise SvlError(f"{group} has no setting '{name}'{did_you_mean(name, fields)}; it has: {', '.join(fields)}")


def split_words(words: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Words without --config-dir, and the folder that it gives."""
    names: list[str] = []
    folders: list[Path] = []
    waiting = iter(words)
    for word in waiting:
        option, equals, value = word.partition("=")
        if option == "--config-dir":
            folders.append(Path(value if equals else next(waiting, ".")))
        else:
            names.append(word)
    return names, folders


def print_page(text: str) -> None:
    """Print a page; plugins' texts can do nothing to a terminal."""
    sys.stdout.write(f"{for_terminal(text)}\n")
