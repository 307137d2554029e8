"""Dependencies point one way, and what only one place may do is done in one place. Read from the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import svl

PACKAGE = Path(svl.__file__).parent
METHODS = ("selectors", "strategies", "compensation")
# A module may import those of earlier lines only.
ORDER = (
    {"core"},
    {"regression", "record"},
    {"config", "store", "data", "attention", "checkpoint", "card", "models"},
    {"loading", "benchmarks", "bundled", "results", "figures", "parallel"},
    {"surgery", "skeleton", "prompts", "replay", "measure", "prefix"},
    {"calibrate", "offload", *METHODS, "perplexity"},
    {"probe", "quantization", "visual_tokens"},
    {"export", "evaluate"},
    {"pipeline"},
    {"sweep"},
    {"cli"},
    {"__main__"},
)
SIDE = {  # imported by nothing
    "trackers": {"core", "record"},
    "report": {"core", "store", "results", "figures", "report"},
    "tasks": {"demo"},
}
TRACKERS = ("trackers/none.py", "trackers/wandb.py", "trackers/mlflow.py")
FILES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text())


def imports(file: str, top_level: bool = False) -> set[str]:
    """Dotted names that a file imports, anywhere or while it is itself imported."""

    def found(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}: relative import"
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif not top_level or not (
                isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                or (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING")
            ):
                yield from found(child)

    return set(found(tree(file)))


def part(name: str) -> str:
    """The module or method folder of svl that a file or dotted name belongs to."""
    return name.removeprefix("svl.").removesuffix(".py").replace("/", ".").partition(".")[0]


def of_svl(file: str) -> set[str]:
    return {part(name) for name in imports(file) if name.startswith("svl.")}


def calls(file: str) -> set[str]:
    """Last part of the name of everything that is called."""
    functions = [node.func for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
    return {
        f.attr if isinstance(f, ast.Attribute) else f.id for f in functions if isinstance(f, ast.Attribute | ast.Name)
    }


def test_every_module_has_its_place():
    known = set().union(*ORDER, SIDE, {"__init__", "demo"})
    assert {part(file) for file in FILES} == known
    assert len(FILES) >= 30


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file):
    own, used = part(file), of_svl(file)
    if own in SIDE:
        assert used <= SIDE[own]
        return
    rank = next((i for i, level in enumerate(ORDER) if own in level), 0)  # __init__ uses nothing
    assert used <= set().union(*ORDER[:rank]) | ({own} & {"demo", "models"})


@pytest.mark.parametrize("file", [f for f in FILES if part(f) in METHODS])
def test_methods_import_core_regression_and_torch_only(file):
    allowed = {"torch", *sys.stdlib_module_names}
    own = ("svl.core.", "svl.regression.")
    assert {n for n in imports(file) if not n.startswith(own) and n.partition(".")[0] not in allowed} == set()


@pytest.mark.parametrize(
    ("library", "owner"),
    [("lmms_eval", "evaluate.py"), ("wandb", "trackers/wandb.py"), ("mlflow", "trackers/mlflow.py")],
)
def test_optional_and_heavy_libraries_have_one_owner(library, owner):
    users = {file for file in FILES if any(name.partition(".")[0] == library for name in imports(file))}
    assert users - {"tasks/utils.py"} == {owner}  # which is code for lmms-eval, run by it


def test_what_the_command_line_needs_first_is_light():
    first = ("core.py", "config.py", "store.py", "benchmarks.py", "cli.py", "pipeline.py", "record.py")
    for file in (*first, *TRACKERS):
        heavy = {"torch", "transformers", "lmms_eval", "wandb", "mlflow", "datasets", "matplotlib"}
        assert {name.partition(".")[0] for name in imports(file, top_level=True)} & heavy == set(), file


def test_only_config_builds_objects_from_names():
    builders = {"import_module", "__import__", "instantiate", "get_class", "get_object", "locate", "eval", "exec"}
    found = {file: used for file in FILES if (used := calls(file) & builders) and not file.startswith("demo/")}
    found = {file: used for file, used in found.items() if used != {"eval"}}  # model.eval()
    assert found == {"config.py": {"import_module"}, "__init__.py": {"import_module"}}


def test_ports_import_transformers_and_themselves_only():
    allowed = {
        "transformers",
        "torch",
        "torchvision",
        "huggingface_hub",
        "numpy",
        "PIL",
        "regex",
        "svl",
        *sys.stdlib_module_names,
    }
    for file in (f for f in FILES if part(f) == "models"):
        assert {n.partition(".")[0] for n in imports(file)} <= allowed, file
        assert of_svl(file) <= {"core", "models"}


def test_public_names_are_no_modules():
    """`import svl.x` would replace the function `svl.x` by the module."""
    assert set(svl.__all__) & {part(file) for file in FILES} == set()
    for name in svl.__all__:
        assert getattr(svl, name).__name__ == name


def test_modelling_code_is_in_ports_only_and_no_bare_asserts():
    root = PACKAGE.parent
    modelling = [p for folder in ("svl", "scripts", "conf") for p in (root / folder).rglob("modeling_*")]
    assert {p.parents[1] for p in modelling if p.suffix == ".py"} <= {PACKAGE / "models"}
    asserting = [f for f in FILES if any(isinstance(node, ast.Assert) for node in ast.walk(tree(f)))]
    assert asserting == []  # user errors are SvlError; python -O must not change behaviour
