"""The names that svl takes from lmms-eval exist and are what they are taken for."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import logging
import re
import sys

import pytest
from helpers.paths import ROOT

pytest.importorskip("lmms_eval")
internals = importlib.import_module("svl.evaluation.lmms_eval_internals")


def test_the_pinned_version_is_the_one_the_seam_was_written_for():
    pinned = re.search(r'"lmms-eval==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert pinned
    assert importlib.metadata.version("lmms_eval") == pinned[1]
    assert f"lmms-eval {pinned[1]}" in internals.__doc__


def test_every_public_name_is_there():
    assert all(hasattr(internals, name) for name in internals.__all__)


def test_nothing_else_imports_lmms_eval():
    """Functions of task files apart, which lmms-eval runs."""
    found = set()
    for file in (ROOT / "svl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.partition(".")[0] == "lmms_eval" for name in names):
                found.add(file.relative_to(ROOT / "svl").as_posix())
    assert found == {"evaluation/lmms_eval_internals.py", "evaluation/tasks/utils.py"}


@pytest.mark.parametrize("task", [internals.GenerationTask, internals.LikelihoodTask])
def test_loading_and_scoring_are_tried_once(task):
    """tenacity's wrapper has `retry`; what it wraps has not."""
    original = task.__mro__[1]
    for name in ("download", "process_results"):
        assert hasattr(getattr(original, name), "retry")
        assert not hasattr(getattr(task, name), "retry")


def test_bars_are_hidden_and_prints_go_to_stderr(capsys):
    from lmms_eval import evaluator
    from lmms_eval.api import task as module

    before = evaluator.tqdm, module.tqdm
    with internals.quiet():
        print("from a library")
        assert list(evaluator.tqdm([1, 2])) == list(module.tqdm([1, 2])) == [1, 2]
    assert (evaluator.tqdm, module.tqdm) == before
    out, err = capsys.readouterr()
    assert (out, err) == ("", "from a library\n")


def test_warnings_of_lmms_eval_are_logged(caplog):
    from loguru import logger

    with caplog.at_level(logging.WARNING, "lmms_eval"):
        logger.info("hidden")
        logger.warning("shown")
    assert [record.getMessage() for record in caplog.records] == ["shown"]


def test_the_names_of_the_vllm_adapter(monkeypatch):
    from lmms_eval.models.chat import vllm

    assert "_select_max_new_tokens" in vars(vllm.VLLM.__mro__[1])
    assert "self.client = LLM(" in inspect.getsource(sys.modules[vllm.VLLM.__mro__[1].__module__])
    adapter = internals.vllm_adapter()
    assert issubclass(adapter, vllm.VLLM)
    assert adapter._select_max_new_tokens(None, 7) == 7
