"""The Python API, as the README shows it, where nothing is installed that only the command line needs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import textwrap

import pytest
from helpers.commands import ENVIRONMENT
from helpers.paths import ROOT

import svl

HIDDEN = ("hydra", "omegaconf", "datasets", "lmms_eval", "wandb", "mlflow", "matplotlib", "rich")
PRELUDE = f"""
import sys


class WithoutHidden:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN!r}:
            return None
        return self.finder.find_spec(name, path, target)


sys.meta_path[:] = [WithoutHidden(finder) for finder in sys.meta_path]
"""


def snippet() -> str:
    """The README's Python code."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return next(code for code in blocks if "svl.load" in code)


def test_readme_needs_one_import():
    imports = [node for node in ast.walk(ast.parse(snippet())) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imports] == ["import svl"]


def test_readme_runs_without_what_only_the_command_line_needs(tmp_path):
    code = snippet().replace('"svl/demo', f'"{ROOT}/svl/demo')
    code = PRELUDE + code.replace('calibration.parquet")', 'calibration.parquet", 3)')
    code += textwrap.dedent("""
        print(len(pruned.layers), plan.removed == tuple(sorted(plan.removed)))
        for name in svl.__all__:
            getattr(svl, name)
    """)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "12 True"
    assert (tmp_path / "pruned-demo" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", svl.__all__)
def test_names_are_what_they_are_called(name):
    assert getattr(svl, name).__name__ == name


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'svl' has no attribute 'laod'"):
        svl.laod  # noqa: B018
