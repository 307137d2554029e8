"""What the site has besides the files of docs/: pages made from schema and code, the changelog, the experiments.

A hook of MkDocs, see mkdocs.yml; `make docs` builds. Links into the repository that are no page of the site become
plain text: the site has to work from a folder, without a server that the source is on.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import svl
from svl.catalog import choices, pages, sources
from svl.catalog.choices import Choice, Group
from svl.catalog.sources import Field

ROOT = Path(__file__).parents[1]
EXPERIMENTS = "experiments"
SHOWN = (".md", ".png")  # of an experiment's folder
RAW = {"changelog.md": "CHANGELOG.md"}  # pages that are files of the repository
FRAME_SCRIPT = "https://unpkg.com/iframe-worker/shim"  # which the theme's plugin `offline` asks for
_LINK = re.compile(r"(?<!!)\[([^\[\]]*)\]\(([^)\s]+)\)")


# ------------------------------------------------------------------------------------------------------- hook


def on_files(files: Files, config: Any) -> Files:
    """Add what is not in docs/."""
    texts = {"configuration.md": configuration_page(), "api.md": api_page()}
    texts |= {page: (ROOT / name).read_text(encoding="utf-8") for page, name in RAW.items()}
    for name, text in texts.items():
        files.append(File.generated(config, name, content=text))
    for file in sorted((ROOT / EXPERIMENTS).rglob("*")):
        if file.suffix in SHOWN:
            name = file.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    place = page.file.src_uri
    source = RAW.get(place) or (place if place.startswith(f"{EXPERIMENTS}/") else f"docs/{place}")

    def to_page(found: re.Match[str]) -> str:
        text, address = found.groups()
        if re.match(r"[a-z]+:|#", address):
            return found[0]
        path, _, anchor = address.partition("#")
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        target = wanted if wanted.startswith(f"{EXPERIMENTS}/") else wanted.removeprefix("docs/")
        target = next((name for name, raw in RAW.items() if raw == wanted), target)
        is_ours = wanted.startswith(("docs/", f"{EXPERIMENTS}/")) or target in RAW
        if not is_ours and (ROOT / wanted).exists():
            return text if "`" in text else f"{text} (`{wanted}`)"
        for name in (target, f"{target}/README.md"):
            if files.get_file_from_path(name):
                link = posixpath.relpath(name, posixpath.dirname(place) or ".")
                return f"[{text}]({link}{'#' + anchor if anchor else ''})"
        return found[0] if not (ROOT / wanted).exists() else text

    return _LINK.sub(to_page, markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Take the script that lets a page in a folder search from the site, not from a server."""
    here = posixpath.dirname(page.file.dest_uri) or "."
    return output.replace(FRAME_SCRIPT, posixpath.relpath("offline_search.js", here))


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    """The same on the page that a server shows for addresses that there are not."""
    return output_content.replace(FRAME_SCRIPT, "offline_search.js")


# ------------------------------------------------------------------------------------------- generated pages


def configuration_page() -> str:
    """Every group with its choices, and every setting with type, default and meaning."""
    parts = [
        "# Configuration",
        "Made from the schema, and from the comments of the files in `conf/`. `svl explain GROUP` and "
        "`svl explain GROUP=CHOICE` print the same for what is installed, plugins included. `???` must be given; "
        "`${...}` refers to another setting or to the environment.",
        "## Settings outside of groups",
        settings_table([("", field) for field in [*choices.root_settings()]]),
    ]
    for group in pages.ordered_groups():
        parts += group_section(group)
    parts += ["## export", settings_table([("export.", field) for field in choices.group_settings("export")])]
    return "\n\n".join(parts) + "\n"


def group_section(group: Group) -> Iterator[str]:
    """What a group decides, its settings, its choices, and of methods the settings of each."""
    yield f"## {group.name}"
    default = "" if group.default == "null" else f" Default: `{group.default}`."
    yield f"{sentence(group.says)}{default}"
    if settings := choices.group_settings(group.name):
        yield settings_table([(f"{group.name}.", field) for field in settings])
    if group.name == "benchmark":
        yield "Of each task (`benchmark.tasks.TASK.NAME`):"
        yield settings_table([("", field) for field in settings_of_tasks()])
    found = choices.choices(group.name)
    yield table(("choice", "what it is", "source"), ((f"`{c.name}`", cell(c.summary), sources_cell(c)) for c in found))
    rows = [(choice, choice.settings()) for choice in found if choice.target]
    if any(fields for _, fields in rows):
        yield "Settings of each:"
        heads = ("choice", "setting", "type", "default", "meaning")
        yield table(heads, ((f"`{c.name}`", *setting_cells("", field)) for c, fields in rows for field in fields))


def settings_of_tasks() -> list[Field]:
    """The settings of each task of a benchmark."""
    fields = sources.class_fields(f"{choices.SCHEMA}.Task")
    return [Field(field.name, field.type, choices.as_yaml(field.default), field.comment) for field in fields]


def api_page() -> str:
    """The names of the package, each with its docstring."""
    names = sorted(svl.__all__, key=lambda name: (name[0].isupper(), name))
    parts = [
        "# Python API",
        "`import svl` gives these names; each is imported when it is first used. Hydra, datasets, lmms-eval, W&B and "
        "matplotlib are not needed for them.",
        *(
            f"::: {getattr(svl, name).__module__}.{name}\n    options: {{heading: svl.{name}, toc_label: {name}}}"
            for name in names
        ),
    ]
    return "\n\n".join(parts) + "\n"


# ----------------------------------------------------------------------------------------------------- tables


def settings_table(fields: Sequence[tuple[str, Field]]) -> str:
    """Settings, each with what stands before its name."""
    return table(("setting", "type", "default", "meaning"), (setting_cells(before, field) for before, field in fields))


def setting_cells(before: str, field: Field) -> tuple[str, str, str, str]:
    """Name, type, default and meaning of a setting."""
    default = "???" if field.default is None else field.default
    return f"`{before}{field.name}`", code(field.type), code(default), cell(field.comment)


def sources_cell(choice: Choice) -> str:
    """Where a choice is from, as links."""
    if choice.target:
        return ", ".join(f"[{link.rpartition('/')[2]}]({link})" for link in choice.papers)
    kind = "" if choice.group == "model" else "datasets/"
    names = [name for name in choice.source.split(", ") if name]
    return ", ".join(f"[{name}](https://huggingface.co/{kind}{name})" for name in names)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sentence(text: str) -> str:
    """A text with a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def code(text: str) -> str:
    """Code in a cell of a table."""
    return f"`{text}`"


def cell(text: str) -> str:
    """A text in a cell of a table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
