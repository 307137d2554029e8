"""What results depend on: the settings and the code of whatever computes them. Versions of libraries are recorded.

The code of a stage is that of its root modules and of all modules of svl (or of the package of a plugin) that they
import, directly or not. It counts as what Python reads: comments, docstrings and layout change no key. Rooms that keep,
show or start runs are never followed into, because they cannot change a number.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import math
import platform
import subprocess
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from svl.config import PACKAGE
from svl.core import Method
from svl.core.contract import method_name
from svl.store.files import digest, remembered

PACKAGES = ("svl", "torch", "transformers", "lmms_eval", "datasets", "hydra-core", "wandb")
RECOVERY_PACKAGES = ("peft", "accelerate")  # what trained weights depend on besides

# Rooms that no stage's code is followed into.
NOT_FOLLOWED = (
    *("svl.config", "svl.config_methods", "svl.config_ranges", "svl.config_schema"),
    *("svl.cli", "svl.plugins", "svl.run", "svl.store", "svl.text", "svl.report", "svl.trackers"),
)

# Where the code of each stage starts; methods add their own. The model's is part of its description in every key.
STAGE_CODE = {
    "data": ("svl.data.hub_data",),
    "model": ("svl.models.loading", "svl.models.ports", "svl.models.prompts"),
    "stats": ("svl.calibration.calibrate",),
    "texts": ("svl.calibration.generated_texts",),
    "probe": ("svl.calibration.removal_probe",),
    "rescoring": ("svl.calibration.rescoring",),
    "patch": ("svl.calibration.activations",),
    "recover": ("svl.recovery.training",),
    "overlap": ("svl.evaluation.picture_overlap",),
    "check": ("svl.pruning.selfcheck", "svl.pruning.surgery"),
    "answers": (
        "svl.evaluation.evaluate",
        "svl.evaluation.answer_items",
        "svl.evaluation.task_metrics",
        "svl.pruning.surgery",
    ),
    "answers of vllm": (
        "svl.evaluation.evaluate",
        "svl.evaluation.answer_items",
        "svl.evaluation.task_metrics",
        "svl.evaluation.vllm",
        "svl.checkpoints.export",
    ),
    "perplexity": ("svl.evaluation.perplexity", "svl.pruning.surgery"),
    "efficiency": ("svl.evaluation.efficiency", "svl.pruning.surgery"),
    "run": ("svl.run.run_result",),
}


def read_code() -> None:
    """Read the code of all stages now: a file that is edited during a run is not what the run computes with."""
    for modules in STAGE_CODE.values():
        code_digest(*modules)


def stage_code(stage: str) -> str:
    """The code digest of what a stage computes with."""
    return code_digest(*STAGE_CODE[stage])


def method_identity(method: Any) -> dict[str, Any]:
    """What a method's results depend on: its class, its code, and its settings (defaults included)."""
    code = code_digest(type(method).__module__)
    return {"class": method_name(method), "code": code, **_fields(method, method_identity)}


def identity_without(method: Any, names: Collection[str]) -> dict[str, Any]:
    """`method_identity` without settings that its results do not depend on."""
    return {name: value for name, value in method_identity(method).items() if name not in names}


def method_settings(method: Any) -> dict[str, Any]:
    """Values of a method's fields, defaults included; those of a method within it beside its `_target_`."""
    return _fields(method, lambda inner: {"_target_": method_name(inner), **method_settings(inner)})


def _fields(method: Any, described: Callable[[Method], dict[str, Any]]) -> dict[str, Any]:
    values = {field.name: getattr(method, field.name) for field in dataclasses.fields(method) if field.init}
    return {name: described(value) if isinstance(value, Method) else _as_json(value) for name, value in values.items()}


def _as_json(value: Any) -> Any:
    """A setting as JSON has it, which knows no infinity."""
    if isinstance(value, tuple | list):
        return type(value)(_as_json(item) for item in value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@cache
def code_digest(*modules: str) -> str:
    """16 hex digits for the code of modules and of what they import from svl and from their own top-level packages.

    The files are read, not imported, once in a process. A module without a source file counts by its name only.
    """
    packages = {"svl", *(name.partition(".")[0] for name in modules)}
    codes: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in codes:
            continue
        file = _source_file(name)
        if file is None:
            codes[name] = ""
            continue
        codes[name], statements = _code_and_imports(file)
        for imported in _imported_modules(statements, name, is_package=file.name == "__init__.py"):
            if imported.partition(".")[0] in packages and not _is_within(imported, NOT_FOLLOWED):
                waiting.append(imported)
    return digest(codes)


def _is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@cache
def _package_folders(package: str) -> tuple[Path, ...]:
    """Folders that hold the modules of a top-level package or, of a single module, the module itself."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return ()
    if spec.submodule_search_locations is None:
        return (Path(spec.origin),) if spec.origin else ()
    return tuple(Path(folder) for folder in spec.submodule_search_locations)


def _source_file(name: str) -> Path | None:
    """The file of a module, found without importing it; None if there is no such module."""
    package, *parts = name.split(".")
    for folder in _package_folders(package):
        if folder.is_file() and not parts:
            return folder
        place = folder.joinpath(*parts)
        for file in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if file.is_file():
                return file
    return None


@remembered
def _code_and_imports(file: Path) -> tuple[str, list[ast.Import | ast.ImportFrom]]:
    """Hash of a file's code without docstrings, and its import statements; those for type checkers are left out."""
    tree = ast.parse(file.read_bytes())
    imports = list(_import_statements(tree))
    code = ast.unparse(_WithoutDocstrings().visit(tree))
    return hashlib.sha256(code.encode()).hexdigest(), imports


def _import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")):
            yield from _import_statements(child)


def _imported_modules(statements: list[ast.Import | ast.ImportFrom], importer: str, is_package: bool) -> Iterator[str]:
    """Modules that the import statements of `importer` name; of `from x import y`, x, and x.y if that is a module."""
    for statement in statements:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
            continue
        module = statement.module or ""
        if statement.level:  # relative: one dot is the package that the importer is in (or is)
            parts = importer.split(".")
            base = parts[: len(parts) - statement.level + is_package]
            module = ".".join([*base, *([module] if module else [])])
        yield module
        for alias in statement.names:
            if _source_file(f"{module}.{alias.name}"):
                yield f"{module}.{alias.name}"


class _WithoutDocstrings(ast.NodeTransformer):
    """Removes docstrings, of attributes too: strings that stand alone as statements compute nothing."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if getattr(node, "body", None) == [] and not isinstance(node, ast.Module):
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node


@cache
def versions(recovers: bool = False) -> dict[str, str]:
    """Versions of what results depend on (and of what trains, if asked), and the commit of a checkout."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *(RECOVERY_PACKAGES if recovers else ())):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    command = ["git", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return found
    return {**found, "git": commit.stdout.strip()} if commit.returncode == 0 else found
