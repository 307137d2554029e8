"""What import-linter and ruff cannot say of the source: what is done in one place only, sizes, light imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from helpers.commands import ENVIRONMENT

import svl

PACKAGE = Path(svl.__file__).parent
FILES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))
# Written after code of others, whose shape they keep: ports of models, functions that lmms-eval calls by name.
PORTS = tuple(file for file in FILES if file.startswith("models/ports/"))
TASKS = tuple(file for file in FILES if "tasks/" in file)
OURS = tuple(file for file in FILES if file not in PORTS)
KERNELS = "calibration/kernels.py"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text())


def functions(file: str) -> list[Function]:
    return [node for node in ast.walk(tree(file)) if isinstance(node, Function)]


def imported(file: str) -> Iterator[str]:
    """The libraries that a file imports, anywhere."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield str(node.module).partition(".")[0]


# --------------------------------------------------------------------------------------------------- one place


OWNERS = {
    "lmms_eval": {"evaluation/lmms_eval_internals.py"},
    "wandb": {"trackers/wandb_writer.py"},
    "mlflow": {"trackers/mlflow.py"},
    "torchao": {"quantization/torchao.py"},
    "accelerate": {"models/placement.py"},
    "peft": {"recovery/adapters.py"},
    "tabulate": {"report/table_writers.py"},
    "jinja2": {"report/page.py"},
}


@pytest.mark.parametrize("library", OWNERS)
def test_an_outside_library_is_called_from_one_place(library):
    users = {file for file in FILES if library in imported(file)}
    assert users - set(TASKS) == OWNERS[library]


def test_private_names_of_a_library_are_in_its_module_of_internals():
    """From `transformers.utils._x`, `hydra._internal`, or `import _x`: names that a new release may take away."""
    seams = {"hydra": "run/hydra_internals.py", "transformers": "models/transformers_internals.py",
             "lmms_eval": "evaluation/lmms_eval_internals.py"}  # fmt: skip
    found = set()
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("__"):
                words = [*str(node.module).split("."), *(alias.name for alias in node.names)]
                if any(word.startswith("_") for word in words):
                    found.add((words[0], file))
    assert {(library, file) for library, file in found if seams.get(library) != file} == set()


def test_objects_are_built_from_names_by_config_only():
    builders = {"import_module", "__import__", "instantiate", "get_class", "get_object", "locate", "eval", "exec"}
    found = defaultdict(set)
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                if called in builders and not (called == "eval" and isinstance(node.func, ast.Attribute)):
                    found[file].add(called)
    importing = {"config_methods.py", "plugins.py", "__init__.py"}
    assert found == {file: {"import_module"} for file in importing}


def test_public_functions_have_a_name_of_their_own():
    """A name is searched for once. Entry points apart, and functions that task files name."""
    where = defaultdict(list)
    for file in set(OURS) - set(TASKS):
        for node in tree(file).body:
            if isinstance(node, Function) and not node.name.startswith("_") and node.name != "main":
                where[node.name].append(file)
    assert {name: files for name, files in where.items() if len(files) > 1} == {}


def test_public_names_of_svl_are_no_modules():
    """`import svl.x` would replace the function `svl.x` by the module."""
    assert set(svl.__all__) & {file.removesuffix(".py").partition("/")[0] for file in FILES} == set()
    for name in svl.__all__:
        assert getattr(svl, name).__name__ == name


def test_nothing_is_asserted():
    """Errors of users are SvlError; python -O must not change what happens."""
    assert [file for file in FILES if any(isinstance(node, ast.Assert) for node in ast.walk(tree(file)))] == []


# ------------------------------------------------------------------------------------------------------- sizes


def test_files_have_at_most_400_lines():
    sizes = {file: len((PACKAGE / file).read_text().splitlines()) for file in OURS if file != "demo/scenes.py"}
    assert {file: n for file, n in sizes.items() if n > 400} == {}


def test_functions_have_at_most_60_lines():
    sizes = {f"{file}: {f.name}": f.end_lineno - f.lineno + 1 for file in OURS for f in functions(file)}
    assert {name: n for name, n in sizes.items() if n > 60} == {}


def test_signatures_have_at_most_7_parameters():
    def parameters(function: Function) -> int:
        given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        return len([a for a in given if a.arg not in ("self", "cls")])

    # kernels for devices take addresses and strides one by one
    sizes = {f"{file}: {f.name}": parameters(f) for file in OURS if file != KERNELS for f in functions(file)}
    assert {name: n for name, n in sizes.items() if n > 7} == {}


def test_formatting_is_left_to_ruff():
    assert sum((PACKAGE / file).read_text().count("# fmt: skip") for file in FILES) <= 5


# ---------------------------------------------------------------------------------------------- light imports


def modules_after(code: str) -> set[str]:
    """The libraries that a fresh interpreter has loaded after `code`."""
    command = [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules, file=sys.stderr)"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stderr.splitlines()[-1].split()}


def test_commands_start_without_heavy_libraries():
    """`--help`, completion, mistakes and reports answer at once."""
    heavy = {"torch", "transformers", "lmms_eval", "datasets", "wandb", "mlflow", "matplotlib", "pyarrow"}
    commands = "import svl.cli, svl.report.command, svl.checkpoints.export_command, svl.trackers.wandb"
    commands += ", svl.evaluation.benchmarks, svl.catalog.command"
    assert modules_after(commands) & heavy == set()


def test_the_package_needs_no_library_of_the_command_line():
    assert modules_after("import svl; svl.load") & {"hydra", "omegaconf", "datasets", "lmms_eval", "wandb"} == set()
