"""What a Python file says of itself without being imported: docstrings, and the fields of a dataclass."""

from __future__ import annotations

import ast
import importlib.util
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from svl.core import SvlError

_COST = re.compile(r"(?:\A|(?<=[.] ))Cost[:,]?\s+(.+)", re.DOTALL)
_PAPER = re.compile(r"arXiv (\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class Field:
    """A setting: its name, its type and default as Python writes them (None: it must be given), what it means."""

    name: str
    type: str
    default: str | None
    comment: str


def module_file(module: str) -> Path:
    """The file of a module, which is not imported (the packages that it is in are).

    Raises:
        SvlError: if there is none.
    """
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        raise SvlError(f"there is no file of the module '{module}'")
    return Path(spec.origin)


@cache
def parsed_module(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(module_file(module).read_text(encoding="utf-8"))


def module_text(module: str) -> str:
    """The docstring of a module."""
    return ast.get_docstring(parsed_module(module)) or ""


def first_sentence(text: str) -> str:
    """The first line of a docstring, without its full stop."""
    return text.partition("\n")[0].removesuffix(".")


def paper_links(text: str) -> list[str]:
    """Addresses of the papers that a text names."""
    return [f"https://arxiv.org/abs/{number}" for number in dict.fromkeys(_PAPER.findall(text))]


def cost_of(text: str) -> str:
    """What a docstring says of a method's cost; empty if nothing."""
    for paragraph in text.split("\n\n"):
        if found := _COST.search(" ".join(paragraph.split())):
            return found[1]
    return ""


def without_cost(text: str) -> str:
    """A docstring without a paragraph about cost alone."""
    return "\n\n".join(paragraph for paragraph in text.split("\n\n") if not paragraph.startswith("Cost"))


def class_fields(target: str) -> list[Field]:
    """The settings of the dataclass `module.Class`, those of its bases first.

    Raises:
        SvlError: if there is no such class.
    """
    module, _, name = target.rpartition(".")
    tree = parsed_module(module)
    found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    if not found:
        raise SvlError(f"there is no class '{name}' in {module}")
    fields: dict[str, Field] = {}
    for base in _bases(module, found[0]):
        fields |= {field.name: field for field in class_fields(base)}
    fields |= {field.name: field for field in _own_fields(module, found[0])}
    return list(fields.values())


@cache
def classes_in_sight(module: str) -> dict[str, str]:
    """Names of classes that a module defines or imports from others -> `module.Class`."""
    found = {}
    for statement in parsed_module(module).body:
        if isinstance(statement, ast.ClassDef):
            found[statement.name] = f"{module}.{statement.name}"
        elif isinstance(statement, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{statement.module}.{alias.name}" for alias in statement.names}
    return found


def _bases(module: str, node: ast.ClassDef) -> Iterator[str]:
    """Bases of a class that have settings, as `module.Class`; what svl.core and libraries ask of methods has none."""
    known = classes_in_sight(module)
    targets = [known.get(base.id, "") for base in node.bases if isinstance(base, ast.Name)]
    ours = ("svl.", f"{module.partition('.')[0]}.")
    yield from (target for target in targets if target.startswith(ours) and not target.startswith("svl.core."))


def _own_fields(module: str, node: ast.ClassDef) -> Iterator[Field]:
    told, comments = _attributes(ast.get_docstring(node) or ""), _comments(module)
    for statement in node.body:
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        kind, name = ast.unparse(statement.annotation), statement.target.id
        if kind.startswith("ClassVar"):
            continue
        end = statement.end_lineno or statement.lineno
        comment = told.get(name) or comments.get((end, False)) or _comment_above(statement.lineno, comments)
        yield Field(name, kind, _default(statement.value), comment.removesuffix("."))


def _comment_above(line: int, comments: dict[tuple[int, bool], str]) -> str:
    """The comment, of one line or more, that ends above a line."""
    above: list[str] = []
    while (line := line - 1, True) in comments:
        above.insert(0, comments[line, True])
    return " ".join(above)


def _default(value: ast.expr | None) -> str | None:
    """A default as Python writes it, seen through `field(default_factory=...)`; None if there is none."""
    if value is None or (isinstance(value, ast.Name) and value.id == "MISSING"):
        return None
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "field":
        made = next((keyword.value for keyword in value.keywords if keyword.arg == "default_factory"), None)
        if isinstance(made, ast.Lambda):
            return ast.unparse(made.body)
        is_mapping = isinstance(made, ast.Name) and made.id in ("dict", "_open_mapping")
        return "{}" if is_mapping else ast.unparse(made or value)
    return ast.unparse(value)


def _attributes(docstring: str) -> dict[str, str]:
    """The part "Attributes:" of a docstring."""
    _, _, part = docstring.partition("Attributes:\n")
    found: dict[str, str] = {}
    name = ""
    for line in part.splitlines():
        if start := re.match(r"    ([\w, ]+): (.*)", line):
            name = start[1]
            found[name] = start[2]
        elif name and line.startswith("        "):
            found[name] += f" {line.strip()}"
        else:
            break
    return {each.strip(): text for names, text in found.items() for each in names.split(",")}


@cache
def _comments(module: str) -> dict[tuple[int, bool], str]:
    """Comments by line, and whether they have it to themselves."""
    text = module_file(module).read_text(encoding="utf-8")
    return {
        (token.start[0], not token.line[: token.start[1]].strip()): token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
