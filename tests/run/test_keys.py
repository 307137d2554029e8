"""The code that keys cover: what changes them, and what does not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
from helpers.commands import ENVIRONMENT

from svl.compensation.refit import Refit
from svl.config import PACKAGE
from svl.run import keys
from svl.strategies.cosine import Cosine
from svl.strategies.iterative import Iterative
from svl.strategies.sleb import Sleb

CHANGES = {  # what is changed in which file -> the digests that change
    "a mended strategy": ("strategies/cosine.py", "\nX = 1\n", {"Cosine"}),
    "a mended selector": ("selectors/tis.py", "\nX = 1\n", {"Tis"}),
    "a mended compensation": ("compensation/linear.py", "\nX = 1\n", {"Linear"}),
    "least squares, which compensations share": ("compensation/regression.py", "\nX = 1\n", {"Linear"}),
    "the hooks of calibration": (
        "calibration/hooks.py",
        "\nX = 1\n",
        {"stats", "patch", "probe", "rescoring", "recover"},
    ),
    "losses of recovery": ("recovery/losses.py", "\nX = 1\n", {"recover"}),
    "trying removals": ("calibration/removal_probe.py", "\nX = 1\n", {"probe", "rescoring"}),
    "measuring again": ("calibration/rescoring.py", "\nX = 1\n", {"rescoring"}),
    "scores": ("evaluation/perplexity.py", "\nX = 1\n", {"perplexity"}),
    "a comment": ("calibration/hooks.py", "\n# a comment\n", set()),
    "a docstring": ("calibration/hooks.py", '\n"""A text that stands alone."""\n', set()),
    "a function's docstring": ("core/stats.py", None, set()),
    "a new strategy": ("strategies/newest.py", "X = 1\n", set()),
    "a report": ("report/rows.py", "\nX = 1\n", set()),
    "a tracker": ("trackers/wandb.py", "\nX = 1\n", set()),
    "the store": ("store/artifacts.py", "\nX = 1\n", set()),
    "the pipeline": ("run/pipeline.py", "\nX = 1\n", set()),
    "the command line": ("cli.py", "\nX = 1\n", set()),
}

DIGESTS = """
    import json, sys
    from pathlib import Path

    from svl.compensation.linear import Linear
    from svl.run.keys import STAGE_CODE, code_digest, method_identity, stage_code
    from svl.selectors.tis import Tis
    from svl.strategies.cosine import Cosine


    def digests():
        code_digest.cache_clear()
        found = {stage: stage_code(stage) for stage in STAGE_CODE}
        return found | {type(m).__name__: method_identity(m)["code"] for m in (Cosine(), Tis(), Linear())}


    before, changed = digests(), {}
    for change, (name, text) in json.load(sys.stdin).items():
        file = Path("svl", name)
        original = file.read_text() if file.exists() else None
        file.write_text(text)
        after = digests()
        changed[change] = [stage for stage in before if after[stage] != before[stage]]
        file.unlink() if original is None else file.write_text(original)
    assert digests() == before
    print(json.dumps(changed))
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """The digests that each of CHANGES changes, in a copy of svl's code."""
    folder = tmp_path_factory.mktemp("tree")
    shutil.copytree(PACKAGE, folder / "svl", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__", "*.parquet"))
    texts = {}
    for change, (name, addition, _) in CHANGES.items():
        file = PACKAGE / name
        text = file.read_text() if file.exists() else ""
        changed_docstrings = re.sub(r'^( +""")(?=\w)', r"\1Well: ", text, flags=re.MULTILINE)
        texts[change] = [name, text + addition if addition else changed_docstrings]
        assert texts[change][1] != text
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DIGESTS)],
        cwd=folder,
        env={**ENVIRONMENT, "PYTHONPATH": str(folder)},
        input=json.dumps(texts),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("change", CHANGES)
def test_keys_change_with_the_code_that_a_stage_runs_and_with_no_other(change, changed):
    assert set(changed[change]) == CHANGES[change][2]


def test_code_of_plugins_is_followed_too(tmp_path, monkeypatch):
    (tmp_path / "my_package" / "inner").mkdir(parents=True)
    files = {
        "method.py": "from . import helper\nfrom .inner.deep import number\n",
        "helper.py": "X = 1\n",
        "inner/deep.py": "from my_package import other\nnumber = 1\n",
        "other.py": "def f():\n    import my_package.late\n",
        "late.py": "Y = 1\n",
        "unused.py": "Z = 1\n",
    }
    for name, text in files.items():
        (tmp_path / "my_package" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = keys.code_digest("my_package.method")
    for name, text in files.items():
        (tmp_path / "my_package" / name).write_text(f"{text}W = 1\n")
        keys.code_digest.cache_clear()
        assert (keys.code_digest("my_package.method") != before) == (name != "unused.py"), name
        (tmp_path / "my_package" / name).write_text(text)
    keys.code_digest.cache_clear()
    assert keys.code_digest("my_package.method") == before


def test_what_only_type_checkers_import_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "my_types").mkdir()
    (tmp_path / "my_types" / "shapes.py").write_text("X = 1\n")
    (tmp_path / "my_types" / "method.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from my_types.shapes import X\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    before = keys.code_digest("my_types.method")
    (tmp_path / "my_types" / "shapes.py").write_text("X = 2\n")
    keys.code_digest.cache_clear()
    assert keys.code_digest("my_types.method") == before


def test_a_method_within_a_method_counts_with_its_code_and_settings():
    ids = {
        json.dumps(keys.method_identity(Iterative(of)), sort_keys=True) for of in (Cosine(), Sleb(), Sleb(samples=2))
    }
    assert len(ids) == 3
    inner = keys.method_identity(Iterative(Sleb(samples=2)))["of"]
    assert inner == keys.method_identity(Sleb(samples=2))
    assert keys.method_settings(Iterative(Sleb(2))) == {"of": {"_target_": "svl.strategies.sleb.Sleb", "samples": 2}}


def test_settings_are_what_strict_json_can_say():
    settings = keys.method_settings(Refit(ridges=(0.5, float("inf"))))
    assert json.loads(json.dumps(settings, allow_nan=False))["ridges"] == [0.5, "inf"]
